import pytest

from fedtune.config import Config
from fedtune.models.zoo import problems, unranked_reasons, zoo

USED = [
    "SmolLM2-135M",
    "SmolLM2-135M-Instruct",
    "SmolLM2-360M",
    "SmolLM2-360M-Instruct",
    "SmolLM2-1.7B",
    "SmolLM2-1.7B-Instruct",
    "Qwen2.5-0.5B",
    "Qwen2.5-0.5B-Instruct",
    "Qwen2.5-1.5B-Instruct",
    "Qwen2.5-7B",
    "Qwen2.5-7B-Instruct",
    "Qwen3-0.6B",
    "Qwen3-4B",
    "Llama-3.2-1B",
    "Llama-3.2-1B-Instruct",
    "Llama-3.2-3B",
    "Llama-3.1-8B-Instruct",
    "Mistral-7B-v0.3",
    "Mistral-7B-Instruct-v0.3",
    "gemma-2-9b-it",
    "gemma-3-270m-it",
    "phi-4",
    "Phi-4-mini-instruct",
    "internlm3-8b-instruct",
    "DeepSeek-R1-Distill-Qwen-1.5B",
    "Bio-Medical-Llama-3-8B",
    "Llama3.1-Aloe-Beta-8B",
    "Qwen2.5-Coder-0.5B-Instruct",
]


def test_the_zoo_has_what_participants_run() -> None:
    names = {m.split("/")[1] for m in zoo()}
    assert set(USED) <= names
    assert len(zoo()) >= 26


@pytest.mark.parametrize("name", list(zoo()))
def test_the_shape_adds_up_to_the_parameters(name: str) -> None:
    """Embeddings, projections and norms of the stated shape are the stated millions within 3 %."""
    m = zoo()[name]
    first = {path: a * b for path, (a, b) in m.linears().items() if path.startswith("model.layers.0.")}
    layer = sum(first.values()) + 2 * m.hidden
    tied = m.layers * layer + m.vocab * m.hidden
    stated = m.parameters * 1e6
    assert min(abs(tied - stated), abs(tied + m.vocab * m.hidden - stated)) < 0.03 * stated
    assert {path.rpartition(".")[2] for path in first} >= set(m.targets)


def test_an_unpinned_model_cannot_be_ranked_and_says_so() -> None:
    free = Config.model_validate({"domain": "finance", "model": {"name": "HPAI-BSC/Llama3.1-Aloe-Beta-8B"}})
    assert "no pinned revision" in unranked_reasons(free)[0]
    pinned = Config.model_validate({"domain": "finance", "model": {"name": "any/thing", "revision": "a1" * 20}})
    assert unranked_reasons(pinned) == ()
    for moving in ("main", "v1.0", "abc1234", "refs/pr/1"):
        branch = Config.model_validate({"domain": "finance", "model": {"name": "any/thing", "revision": moving}})
        assert "is not a commit" in unranked_reasons(branch)[0]
    assert unranked_reasons(Config(domain="finance")) == ()


def test_any_hub_id_passes_and_a_word_does_not() -> None:
    assert not list(problems(Config.model_validate({"domain": "x", "model": {"name": "any/thing"}})))
    wrong = list(problems(Config.model_validate({"domain": "x", "model": {"name": "Qwen2.5-0.5B"}})))
    assert 'did you mean "Qwen/Qwen2.5-0.5B"?' in str(wrong[0])


def test_revisions_are_whole_commits_and_no_two_models_share_one() -> None:
    pins = [m.revision for m in zoo().values() if m.revision and not m.id.startswith("packaged/")]
    assert len(pins) >= 30
    assert len(set(pins)) == len(pins)
    assert all(len(p) == 40 and set(p) <= set("0123456789abcdef") for p in pins)
