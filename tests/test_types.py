from fedtune.types import ClientStats, ConfigError, Problem, Rejection, RoundRecord, derive_seed, nearest


def test_seeds_depend_on_every_key_and_are_stable() -> None:
    assert derive_seed(42, "sample", 1) == derive_seed(42, "sample", 1)
    keys = [(42, "sample", 1), (43, "sample", 1), (42, "sample", 2), (42, "rows", 1), (42, "sample", 1, 0)]
    assert len({derive_seed(*k) for k in keys}) == len(keys)
    assert 0 <= derive_seed(1, "x") < 2**63


def test_nearest_suggests_only_what_is_near() -> None:
    assert nearest("fedpox", ["fedprox", "fedit"]) == 'did you mean "fedprox"?'
    assert nearest("zzzz", ["fedprox", "fedit"]) == ""


def test_all_problems_stand_in_one_message() -> None:
    text = str(ConfigError("x.toml", [Problem("a", "is wrong", "do b"), Problem("c", "too")]))
    assert text.splitlines() == ["x.toml (2 problems)", "  a: is wrong; do b", "  c: too"]


def test_a_problem_is_told_in_a_bounded_number_of_plain_characters() -> None:
    told = str(Problem("\x1b[2J" * 10**5, "y" * 10**6, "do b"))
    assert len(told) < 5_000
    assert told.isprintable()
    assert told.endswith("y; do b")


def test_round_record_survives_json_and_weighs_its_loss() -> None:
    stats = (ClientStats(0, 10, 100, 2, 1.0), ClientStats(1, 30, 300, 2, 3.0), ClientStats(2, 5, 1, 1, None))
    record = RoundRecord(1, "ok", 1e-3, (0, 1, 2), stats, (Rejection(3, "error", "x"),), 7, 8, ("note",))
    assert record.loss == 2.5
    assert RoundRecord.from_json(record.as_json()) == record


def test_round_without_losses_has_none() -> None:
    assert RoundRecord(1, "skipped", 0.1, (), (), (), 0, 0).loss is None
