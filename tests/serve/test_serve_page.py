"""The page at /: a picture is uploaded in a real browser, asked about, and drawn with its kept tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving
from chromium import Tab, chromium
from serving import Running

from vtprune.evals.toys import image as toy
from vtprune.integrations.serve import ServedModel


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving.serving(ServedModel(None, "divprune", keep=0.25)) as one:
        yield one


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with chromium(tmp_path / "profile") as one:
        yield one
        assert not one.complaints


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_picture_is_uploaded_and_answered(running: Running, tab: Tab, tmp_path: Path, width: int, dark: bool) -> None:
    (question,) = toy.questions(1, capabilities=["shape"])
    file = tmp_path / "shapes.png"
    question.image.resize((320, 320)).save(file)
    tab.open(running.url, width, 900, dark)
    tab.until("document.getElementById('about').textContent.includes('divprune at 25 %')")
    tab.upload("#file", file)
    tab.until("!document.getElementById('preview').hidden")
    words = toy_words(question.prompt)
    tab.run(f"document.getElementById('question').value = {words!r}")
    tab.run("document.getElementById('ask').click()")
    tab.until("document.querySelectorAll('#kept canvas').length === 1")
    assert tab.run("document.getElementById('answer').textContent") == question.answer
    assert tab.run("document.getElementById('visual').textContent") == "256 → 64"
    assert re.fullmatch(r"\d+ ms", tab.run("document.getElementById('total').textContent"))
    assert tab.run("document.getElementById('error').textContent") == ""
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert faded(tab) == pytest.approx(0.75, abs=0.03), "dropped cells are dimmed, kept ones are not"
    assert all(url.startswith((running.url, "data:")) for url in tab.requests)
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def faded(tab: Tab) -> float:
    """The share of the 16 x 16 cells whose middle is not as in the picture."""
    return tab.run("""(() => {
        const drawn = document.querySelector('#kept canvas'), plain = document.createElement('canvas');
        plain.width = drawn.width; plain.height = drawn.height;
        plain.getContext('2d').drawImage(document.getElementById('preview'), 0, 0, plain.width, plain.height);
        let changed = 0;
        for (let i = 0; i < 256; i++) {
            const x = (i % 16 + 0.5) * plain.width / 16, y = (Math.floor(i / 16) + 0.5) * plain.height / 16;
            const [a, b] = [drawn, plain].map((c) => c.getContext('2d').getImageData(x, y, 1, 1).data.join());
            changed += a !== b;
        }
        return changed / 256;
    })()""")


def toy_words(prompt: str) -> str:
    return prompt.split("<image>")[1].removesuffix("answer:").strip()


def test_the_sample_and_a_budget(running: Running, tab: Tab) -> None:
    tab.open(running.url)
    tab.run("document.getElementById('sample').click()")
    tab.until("!document.getElementById('preview').hidden")
    tab.run("document.getElementById('keep').value = '1'")
    tab.run("document.getElementById('ask').click()")
    tab.until("document.querySelectorAll('#kept canvas').length === 1")
    assert tab.run("document.getElementById('visual').textContent") == "256 → 256"
    assert tab.run("document.getElementById('answer').textContent") == "3"


def test_a_refusal_is_told(running: Running, tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_bytes(b"no picture")
    tab.open(running.url)
    tab.upload("#file", tmp_path / "note.png")
    tab.until("document.getElementById('error').textContent.includes('cannot show that file')")
    tab.run("document.getElementById('question').value = '<image> what ?'")
    tab.run("document.getElementById('ask').click()")
    tab.until("document.getElementById('error').textContent.includes('leave it out')")
    assert not tab.run("document.getElementById('ask').disabled")
    assert [told for told in tab.complaints if "400" in told]
    tab.complaints.clear()  # Chromium notes every answer that is no 200


def test_the_page_asks_for_the_key(tab: Tab) -> None:
    with serving.serving(ServedModel(None, "divprune", keep=0.25), api_key="secret") as running:
        tab.open(running.url)
        tab.until("!document.getElementById('key').hidden")
        tab.run("document.getElementById('key').value = 'secret'")
        tab.run("document.getElementById('ask').click()")
        tab.until("document.getElementById('answer').textContent !== ''")
        tab.complaints.clear()  # the 401
