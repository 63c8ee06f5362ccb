"""Every row of the registry of signals: its formula against float64, its row in a patched model, and rows of users.

The lists come from the registry, so a new signal is tested without an edit here, but for its oracle in
`signal_oracles.ORACLES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import vits
from signal_oracles import ORACLES, PAST, TEXT, VISUAL, B, Case, D, G, N, Words
from test_registry import install
from torch import Tensor

import vtprune
from vtprune import Assignment, Method, Signal, Stage, UnsupportedModel, Visual, VtpruneError
from vtprune.registry import SIGNALS
from vtprune.signals import LayerAttention, LayerPass, SignalKind, kind_of, kinds, signal


def case(place: str, heads: int = 4, masked: bool = True) -> tuple[Case, LayerAttention]:
    """An attention product as the tower shows it (no past), and as a decoder layer does (causal, keys of before)."""
    g = torch.Generator().manual_seed(heads)
    past = PAST if place == "llm" else 0
    groups = G if place == "llm" else heads
    q, k, v = (torch.randn(B, h, n, D, generator=g) for h, n in ((heads, N), (groups, past + N), (groups, past + N)))
    seen = torch.ones(B, N, past + N, dtype=torch.bool)
    if place == "llm":
        seen = seen.tril(past)
    if masked:
        seen[1, :, past + 8] = False
        seen[1, 8] = seen[1, 7]  # padding computes something, which must not count
    mask = seen[:, None] if masked else None
    prompt = Words() if place == "llm" else None
    return Case(q, k, v, seen, past, place == "llm"), LayerAttention(q, k, v, mask, D**-0.5, past, prompt)


def _turned() -> tuple[Any, Any]:
    """Two modules' input and output, and how far and how much they move each token."""
    g = torch.Generator().manual_seed(1)
    x, y, real = torch.randn(B, N, D, generator=g), torch.randn(B, N, D, generator=g), Words().real()
    want = torch.zeros(B, N).double()
    for b in range(B):
        inside = [i for i in range(N) if real[b, i]]
        a, c = x[b, inside].double(), y[b, inside].double()
        cosine = (a * c).sum(1) / (a.norm(dim=1) * c.norm(dim=1))
        want[b, inside] = c.norm(dim=1) / a.norm(dim=1) * (1 - cosine).softmax(0)
    return kind_of("transition")(x, y, real), want


def _spoken() -> tuple[Any, Any]:
    out, real = torch.randn(B, N, 3, D, generator=torch.Generator().manual_seed(2)), Words().real()
    asked = [[i for i in range(N) if real[b, i]] for b in range(B)]
    want = [[sum(out[b, i, h].double().abs().sum() for i in asked[b]) for h in range(3)] for b in range(B)]
    return kind_of("head_output")(out, real), torch.tensor(want).double()


def _rotated() -> tuple[Any, Any]:
    """Queries and keys of ones, turned by their places, as Llama turns them."""
    angle = torch.arange(N)[None, :, None] * torch.tensor([1.0, 0.3]).repeat(2)
    ones = torch.ones(N, D).double()
    half = torch.cat([-ones[:, D // 2 :], ones[:, : D // 2]], 1)
    turned = ones * angle[0].double().cos() + half * angle[0].double().sin()
    want = torch.stack([turned @ turned[TEXT[b]].T / D**0.5 for b in range(B)])
    return kind_of("rope_weight")(angle.cos(), angle.sin(), Words()), want


def _turns(angle: Tensor, table: int) -> tuple[Any, Any]:
    """Rows whose first real token stands at another place than 0 have the means that they would have from 0 on."""

    class Later(Words):
        def real(self) -> Tensor:
            return torch.arange(N) >= torch.tensor([[0], [2]])

    tables = angle.cos(), angle.sin()
    name, turn = (("rope_cos", torch.cos), ("rope_sin", torch.sin))[table]
    want = [turn(angle[0].double() - angle[0, first].double()).mean(-1) for first in (0, 2)]
    return kind_of(name)(*tables, Later()), torch.stack(want)


def _angles() -> Tensor:
    return torch.arange(N)[None, :, None] * torch.tensor([1.0, 0.3]).repeat(2)


def _relevant() -> tuple[Any, Any]:
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(3))
    want = [(x[b, VISUAL[b]].double() @ x[b, TEXT[b]].double().T).softmax(1).mean(0) for b in range(B)]
    return torch.stack(kind_of("relevance")(x, Words())), torch.stack(want)


def _passed() -> LayerPass:
    """A layer that did something, and a norm that stretches channels."""
    g = torch.Generator().manual_seed(4)
    before, after, weight = torch.randn(B, N, D, generator=g), torch.randn(B, N, D, generator=g), torch.arange(1.0, 5.0)
    return LayerPass(before, after, lambda x: x * weight, Words())


def _changed() -> tuple[Any, Any]:
    run = _passed()
    pairs = zip(run.before.double().flatten(0, 1).tolist(), run.after.double().flatten(0, 1).tolist())
    want = [sum((a - b) ** 2 for a, b in zip(before, after)) ** 0.5 for before, after in pairs]
    return kind_of("layer_change")(run), torch.tensor(want).double().view(B, N)


def _normed() -> tuple[Any, Any]:
    run = _passed()
    return kind_of("final_states")(run), run.after.double() * torch.arange(1, 5).double()


def _normed_text() -> tuple[Any, Any]:
    _, want = _normed()
    return torch.stack(kind_of("text_final_states")(_passed())), torch.stack([want[b, TEXT[b]] for b in range(B)])


def _handed_on() -> tuple[Any, Any]:
    x = torch.randn(B, N, D)
    return kind_of("hidden")(x), x.double()


# Of signals with another source: what they answer, and what they should.
OTHERS = {
    "transition": _turned,
    "head_output": _spoken,
    "rope_weight": _rotated,
    "rope_cos": lambda: _turns(_angles(), 0),
    "rope_sin": lambda: _turns(_angles(), 1),
    "relevance": _relevant,
    "hidden": _handed_on,
    "layer_change": _changed,
    "final_states": _normed,
    "text_final_states": _normed_text,
}
PLAIN = vits.NAMES[0]
ROWS = pytest.mark.parametrize("row", kinds(), ids=lambda row: row.name)


@ROWS
def test_every_signal_equals_its_formula(row: SignalKind) -> None:
    if row.source == "carried":
        assert row.where == ()
    elif row.source != "attention":
        assert row.name in OTHERS, f"signal {row.name!r} has no oracle: add one to OTHERS in test_signal_rows.py"
        got, want = OTHERS[row.name]()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    else:
        assert row.name in ORACLES, f"signal {row.name!r} has no oracle: add one to ORACLES in signal_oracles.py"
        for place in {"llm" if place == "llm" else "tower" for place in row.where}:
            for masked in (True,) if place == "llm" else (False, True):
                c, attention = case(place, masked=masked)
                got: Any = row(attention)
                want = ORACLES[row.name](c)
                if row.of_words:
                    torch.testing.assert_close(torch.stack(got).double(), want, rtol=1e-5, atol=1e-6)
                    continue
                inside = c.asked.bool()[:, row.of_cls :]
                torch.testing.assert_close(got.double()[inside], want[inside], rtol=1e-5, atol=1e-6)


def test_keys_are_measured_as_if_no_padding_stood_before_them() -> None:
    """The sizes of a row behind padding are those it has from position 0 on; channels that do not turn stay."""
    g = torch.Generator().manual_seed(5)
    plain, angle, pads = torch.randn(1, G, N, 6, generator=g), _angles(), 3
    half = torch.cat([-plain[..., 2:4], plain[..., :2]], -1)

    def turned(at: Tensor) -> Tensor:
        return torch.cat([plain[..., :4] * at.cos() + half * at.sin(), plain[..., 4:]], -1)

    class Alone(Words):
        batch = 1

        def real(self) -> Tensor:
            return (torch.arange(N) >= pads)[None]

        def text_slots(self, row: int, device: torch.device) -> Tensor:
            return torch.tensor([6, 8])

    step = torch.tensor([1.0, 0.3]).repeat(2)
    keys, rope = turned(angle), (1.5 * angle.cos(), 1.5 * angle.sin())
    a = LayerAttention(keys.repeat(1, 2, 1, 1), 1.5 * keys, keys, None, 0.5, 0, Alone(), rope=rope)
    want = 1.5 * turned((torch.arange(N) - pads)[None, :, None] * step).abs().sum((1, 3))
    torch.testing.assert_close(kind_of("key_size")(a)[:, pads:], want[:, pads:])
    torch.testing.assert_close(kind_of("text_key_size")(a)[0], want[0, [6, 8]])


@ROWS
def test_every_row_says_what_it_is(row: SignalKind) -> None:
    first = row.doc.splitlines()[0]
    assert first[0].isupper() or first.startswith("q.k"), first
    assert first.endswith((".", ":")), first
    assert row.over_queries <= (row.source == "attention")
    assert not (row.of_cls and "llm" in row.where)


@dataclass(frozen=True)
class Reads(Method):
    """Keeps the first tokens, and writes down the signals of the units it sees."""

    wanted: tuple[Signal, ...] = ()
    of: Any = "tokens"
    log: Any = None

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.wanted

    def __call__(self, v: Visual) -> Assignment:
        assert v.budget is not None
        self.log.append((v.n, dict(v.signals)))
        return Assignment(torch.arange(v.budget))


def read_by_a_method(where: Any, *wanted: Signal, family: str = "llava") -> list[tuple[int, dict[Signal, Tensor]]]:
    """What the engine hands to a method of a user, a list of (N, signals)."""
    model, batch, log = families.model(family), families.inputs(family), []
    of = "heads" if kind_of(wanted[0]).source == "heads" else "tokens"
    with torch.no_grad(), vtprune.patch(model, Stage(where, Reads(wanted, of, log), keep=0.5)):
        model(**batch)
    assert log
    return log


PLACES = [(row, place) for row in kinds() for place in ("tower", "llm") if place in row.where]


@pytest.mark.parametrize(("row", "place"), PLACES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_place_hands_it_to_a_method_in_its_shape(row: SignalKind, place: str) -> None:
    inside = [("vit", 1)] if row.source == "attention" else []
    for where in [1] if place == "llm" else ["llm", *inside]:
        wanted = Signal(row.name, None if row.source == "states" else -1)
        for n, signals in read_by_a_method(where, wanted):
            x = signals[wanted]
            assert x.dim() == len(row.shape.split(","))
            assert bool(x.isfinite().all())
            assert x.shape[0] == n or not row.per_token
            assert x.is_floating_point()


@ROWS
def test_a_place_that_cannot_read_it_refuses_it_by_name(row: SignalKind) -> None:
    model = families.model("llava")
    wanted = (Signal(row.name, None if row.source == "states" else -1),)
    if "tower" not in row.where:
        for where in ("llm", ("vit", 1)):
            with pytest.raises(UnsupportedModel, match=row.name):
                vtprune.patch(model, Stage(where, Reads(wanted), keep=0.5))
    if "llm" not in row.where:
        with pytest.raises(ValueError, match=row.name):
            vtprune.patch(model, Stage(1, Reads(wanted), keep=0.5))
    if "vit" not in row.where:
        with pytest.raises(UnsupportedModel, match=row.name):
            vtprune.patch(vits.model(PLAIN), Reads(wanted), keep=0.5)


# -- signals of users -------------------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests register into a copy."""
    kinds()
    monkeypatch.setattr(SIGNALS, "known", dict(SIGNALS.known))
    yield
    SIGNALS.forget()


def twice_the_norm(a: LayerAttention) -> Tensor:
    """Twice the L1 norm of the values' mean over heads."""
    return 2 * a.values.float().mean(1).norm(p=1, dim=-1)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("where", ["llm", ("vit", 1), 1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_users_signal_reaches_a_users_method(where: Any, family: str) -> None:
    vtprune.signals.signal("twice_the_norm", shape="[N]", where=("tower", "llm"))(twice_the_norm)
    ours, theirs = Signal("value_norm"), Signal("twice_the_norm")
    for _, signals in read_by_a_method(where, ours, theirs, family=family):
        torch.testing.assert_close(signals[theirs], 2 * signals[ours])


@pytest.mark.usefixtures("own")
def test_a_users_signal_in_a_plain_vision_transformer() -> None:
    @signal("first_key", shape="[N]", where=("vit",))
    def first_key(a: LayerAttention) -> Tensor:
        """The first channel of the first head's key."""
        return a.keys[:, 0, :, 0]

    @signal("no_values", shape="[N]", where=("vit",))
    def no_values(a: LayerAttention) -> Tensor:
        """Something of the values, which are not shown here."""
        return a.values[:, 0, :, 0]

    ours, theirs, log = Signal("keys"), Signal("first_key"), []
    with torch.no_grad(), vtprune.patch(vits.model(PLAIN), Reads((ours, theirs), log=log), keep=0.5):
        vits.model(PLAIN)(vits.images())
    assert log
    for _, signals in log:
        torch.testing.assert_close(signals[theirs], signals[ours][:, 0])
    with (
        torch.no_grad(),
        vtprune.patch(vits.model(PLAIN), Reads((Signal("no_values"),), log=log), keep=0.5),
        pytest.raises(vtprune.UnsupportedCall, match="no values"),
    ):
        vits.model(PLAIN)(vits.images())


@pytest.mark.usefixtures("own")
def test_sources_beside_the_attention_product() -> None:
    """Of the states the projector reads, of a module, of rotary embeddings, of embeddings, and of heads."""

    def negative(name: str, like: str) -> Signal:
        row = kind_of(like)

        def read(*given: Any) -> Any:
            """The same, with the other sign."""
            x = row(*given)
            return [-part for part in x] if isinstance(x, list) else -x

        signal(name, shape=row.shape, where=row.where, source=row.source, so_far=row.so_far)(read)
        return Signal(name, None if row.source == "states" else -1)

    for row in [row for row in kinds() if row.source not in ("attention", "carried")]:
        theirs = negative(f"minus_{row.name}", row.name)
        ours = Signal(row.name, theirs.layer)
        for _, signals in read_by_a_method("llm" if row.source == "states" else 1, ours, theirs):
            assert torch.equal(signals[theirs], -signals[ours])


@pytest.mark.usefixtures("own")
def test_select_takes_a_users_signal() -> None:
    x, wanted, log = torch.randn(6, 4), Signal("twice_the_norm"), []
    with pytest.raises(ValueError, match="twice_the_norm"):
        vtprune.select(x, Reads((wanted,), log=log), keep=3, signals={"twice_the_norm": x[:, 0]})
    signal("twice_the_norm", shape="[N]", where=("tower",))(twice_the_norm)
    vtprune.select(x, Reads((wanted,), log=log), keep=3, signals={"twice_the_norm": x[:, 0]})
    assert torch.equal(log[0][1][wanted], x[:, 0])


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("where", ["llm", ("vit", 1), 1])
def test_a_signal_of_the_wrong_shape_is_named(where: Any) -> None:
    @signal("flat", shape="[N]", where=("tower", "llm"))
    def flat(a: LayerAttention) -> Tensor:
        """A number a row."""
        return a.q.mean((1, 2, 3))

    message = r"signal 'flat' of \S*test_signal_rows answered \[\d+\].*must be a tensor \[B, N\]"
    with pytest.raises(VtpruneError, match=message):
        read_by_a_method(where, Signal("flat"))


@pytest.mark.parametrize("where", ["llm", ("vit", 1), 1])
def test_a_name_that_nobody_registered_lists_the_names(where: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown signal 'clss' \(did you mean 'cls'\?\).*received"):
        vtprune.patch(families.model("llava"), Stage(where, Reads((Signal("clss"),)), keep=0.5))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": "[M]"}, r"shape='\[M\]', choose one of \[N\]"),
        ({"where": "tower"}, "where='tower', give a tuple of tower, llm, vit"),
        ({"where": ("decode",)}, "give a tuple of tower, llm, vit"),
        ({"source": "mlp"}, "source='mlp', choose one of attention"),
        ({"source": "states", "where": ("llm",)}, "source='states' is read in tower"),
        ({"shape": "[N, T]", "where": ("tower",)}, "stands inside the LLM only"),
        ({"shape": "[H]", "where": ("llm",)}, "go together"),
        ({"source": "modules", "where": ("llm",), "so_far": True}, "so_far=True"),
        (
            {"shape": "[T]", "source": "rotary", "where": ("llm",)},
            "for the sources 'embeddings', 'attention' and 'layer'",
        ),
        ({"source": "embeddings", "where": ("llm",)}, "a shape of words"),
        ({"shape": "[T]", "where": ("llm",), "so_far": True}, "not for words"),
        ({"name": "cls"}, "the name is taken by vtprune.signals.attention.cls"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    given = {"name": "mine", "shape": "[N]", "where": ("tower",), **fields}
    with pytest.raises(ValueError, match=rf"@signal\('{given['name']}'\): .*{message}"):
        signal(given.pop("name"), **given)(twice_the_norm)
    with pytest.raises(ValueError, match="no docstring"):
        signal("mine", shape="[N]", where=("tower",))(lambda a: a.q)


CODE = '''
import vtprune
from vtprune.signals import signal

@signal("{name}", shape="[N]", where=("llm",))
def read(a):
    """The norm of the first head's values."""
    return a.values[:, 0].float().norm(dim=-1)
'''


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("entry", ["{0}", "{0}:read"])
def test_signals_of_packages_come_by_entry_point(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module may be named or the row; a package that fails is told by name, and the others go on."""
    module = f"vtprune_norm_{len(entry)}"
    install(tmp_path, module, CODE.format(name="first_norm"), f"good = {entry.format(module)}", "vtprune.signals")
    install(tmp_path, f"{module}_bad", CODE.format(name="half") + "1 / 0", f"bad = {module}_bad", "vtprune.signals")
    install(tmp_path, f"{module}_taken", CODE.format(name="cls"), f"taken = {module}_taken", "vtprune.signals")
    monkeypatch.syspath_prepend(tmp_path)
    SIGNALS.forget()
    with pytest.warns(RuntimeWarning, match="was left out") as warned:
        found = read_by_a_method(1, Signal("first_norm"))
    assert all(x[Signal("first_norm")].shape == (n,) for n, x in found)
    assert sorted(str(w.message).split("'")[1] for w in warned if "left out" in str(w.message)) == ["bad", "taken"]
    for name in ("half", "bad"):
        with pytest.raises(ValueError, match=f"signal {name!r} is not there: plug-in 'bad'.*ZeroDivisionError"):
            vtprune.patch(families.model("llava"), Stage(1, Reads((Signal(name),)), keep=0.5))
    assert kind_of("cls").read.__module__ == "vtprune.signals.attention"
