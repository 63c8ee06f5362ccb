"""Ask a server about a picture, with the budget of the server and with one of our own.

Start one first: `vtprune serve`, or `vtprune serve --model ID --recipe FILE`. Then
`python client.py [URL] [PICTURE QUESTION]`; without a picture the toy is asked about one of its own.
"""

import base64
import io
import sys

import openai

url, *mine = sys.argv[1:] or ["http://127.0.0.1:8000"]
if mine:
    with open(mine[0], "rb") as file:
        picture, question = file.read(), mine[1]
else:
    from vtprune.evals import tiny

    asked, buffer = tiny.questions(per_capability=1, capabilities=["color"])[0], io.BytesIO()
    asked.image.save(buffer, "PNG")
    picture, question = buffer.getvalue(), asked.prompt.removeprefix("<s> <image>").removesuffix("answer:").strip()

data = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id
for budget in ({}, {"keep_ratio": 0.5}, {"keep_tokens": 8}):
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], extra_body={"mm_processor_kwargs": budget}
    )
    counts = answer.usage.vtprune
    print(
        f"{budget or 'as served'}: {answer.choices[0].message.content!r}, kept {counts['visual_tokens_kept']} of "
        f"{counts['visual_tokens']} visual tokens, prefilled {answer.usage.prompt_tokens} tokens"
    )
