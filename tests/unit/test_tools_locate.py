"""`megascale data locate` and `inspect RUN`: the text that is shown is what the loader gave to that rank."""

import pytest
from tokenizers import Tokenizer

from data_tools.inspect import describe_run_row
from data_tools.locate import locate, open_run
from megascale.errors import DataError
from megascale.parallel.layout import Layout
from tests.support.corpus import make_corpus
from tests.support.past_run import PastSession, make_past_run
from tests.support.streams import stream_config

SESSIONS = [
    PastSession(0, 5, Layout(dp=2, tp=2)),
    PastSession(3, 7, Layout(dp=3)),
    PastSession(7, 9, Layout(dp=1)),
]
FIM = {"prefix_token": "w90", "middle_token": "w91", "suffix_token": "w92"}


@pytest.fixture(scope="module", params=["concat", "bestfit"])
def past(request, tmp_path_factory):
    """A run over a blend whose second session went back two steps: (folder, tokens that were read, tokenizer)."""
    folder = tmp_path_factory.mktemp("past")
    corpora = {
        name: {"folder": str(make_corpus(folder / name, seed=seed)), "weight": seed}
        for name, seed in (("web", 2), ("code", 1))
    }
    if request.param == "bestfit":
        corpora["code"]["fim_fraction"] = 0.7
    config = stream_config(corpora, data={"packing": request.param, "fim": FIM})
    read = make_past_run(folder / "run", config, SESSIONS)
    return folder / "run", read, Tokenizer.from_file(str(folder / "web/tokenizer.json"))


def words_of(shown):
    """The text of all pieces of a shown row."""
    return [word for line in shown.splitlines() if line.startswith(("w", "<")) for word in line.split()]


@pytest.mark.parametrize(("step", "rank", "replica"), [
    (1, 0, 0), (3, 1, 0), (3, 2, 1), (4, 0, 0), (5, 2, 2), (7, 1, 1), (8, 0, 0), (9, 0, 0),
])
def test_the_text_is_what_the_rank_read(past, step, rank, replica):
    """Steps 4 and 5 ran twice: the second layout counts. Caught mutations: the first session that ran a step; the rank
    itself as the replica; rows of the step after."""
    folder, read, tokenizer = past
    tokens_BT = read[step, replica]
    for row in (0, len(tokens_BT) - 1):
        inputs = words_of(locate(folder, step, rank, row))[:-1]  # the last token is a label only
        expected = tokenizer.decode(tokens_BT[row].tolist(), skip_special_tokens=False).split()
        assert len(inputs) > 10
        assert expected == inputs + ["<|endoftext|>"] * (len(expected) - len(inputs))


def test_a_step_as_a_table_names_every_row_once(past):
    folder, _, _ = past
    title, _, *lines = locate(folder, 3, None, None).splitlines()
    assert "rows 24 .. 35, dealt out to 2 replicas in session 1 of 3" in title
    assert sorted(int(line.split()[2]) for line in lines) == list(range(24, 36))
    title, _, *own = locate(folder, 3, 2, None).splitlines()
    assert title.endswith("rank 2 is of replica 1, whose ranks 2, 3 read the same rows")
    assert own == lines[6:]
    places = {tuple(line.split()[3:]) for line in lines}
    assert len(places) == 12


def test_a_row_of_a_run_by_its_number(past):
    folder, _, _ = past
    lines = locate(folder, 6, None, None).splitlines()[2:]
    number = int(lines[4].split()[2])
    shown = describe_run_row(open_run(folder).stream, number)
    assert shown == locate(folder, 6, 1, 0).split("\n", 1)[1]
    corpus, epoch, shard = lines[4].replace(",", "").split()[3:6]
    assert shown.startswith(f"row {number}: corpus {corpus}, epoch {epoch}, {shard}")


@pytest.mark.parametrize(("step", "rank", "row", "fault"), [
    (0, 0, 0, r"--step 0 .* the steps 1 .. 9"),
    (10, 0, 0, r"--step 10 .* the steps 1 .. 9"),
    (4, 3, 0, r"--rank 3: session 2 had the ranks 0 .. 2 \(pp 1, dp 3, cp 1, tp 1\)"),
    (4, -1, 0, r"--rank -1: session 2"),
    (4, 0, 4, r"--row 4: replica 0 read the rows 0 .. 3 in step 4"),
    (4, 0, -1, r"--row -1: replica 0"),
    (4, None, 0, r"--row 0 is counted among the rows of a rank; add --rank, of 3"),
])
def test_what_there_was_not_is_refused(past, step, rank, row, fault):
    with pytest.raises(DataError, match=fault):
        locate(past[0], step, rank, row)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no config.yaml: give the folder of a run"):
        locate(tmp_path, 1, None, None)
