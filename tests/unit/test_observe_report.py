"""The report: whole with all files and with the metrics alone, self-contained, and safe against what it shows."""

from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import pytest
import yaml

from megascale.errors import DataError
from megascale.observe.curves import draw_loss_curve, running_mean
from megascale.observe.jsonl import JsonlSink
from megascale.observe.metrics import CorpusEval, build_eval_record
from megascale.observe.report import write_report
from megascale.observe.run_files import BaselineFit, Session, append_session, write_baselines
from tests.unit.test_observe_sinks import train_record

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects tags, addresses and text, and checks that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.ids, self.text, self._open = [], [], [], "", []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run <b>1"
    folder.mkdir()
    sink = JsonlSink(folder, 0)
    for step in range(1, 41):
        sink.log_train(train_record(step, loss=8.0 / step, grad_norm=float("nan") if step == 7 else 1.0 / step))
        if step % 10 == 0:
            sink.log_eval(build_eval_record(step, 9.0 / step, 100, 400, 1.0, 1.0))
    sink.close("finished")
    return folder


def test_report_of_metrics_alone(run_folder):
    page = Page(write_report(run_folder).read_text())
    assert page.tags.count("svg") == 5
    assert "Sessions" not in page.text
    assert "0.2250" in page.text


def test_report_of_a_blend(run_folder):
    sink = JsonlSink(run_folder, 40)
    sink.log_train(train_record(41, ledger={"code": 3_000_000, HOSTILE: 1_000_000}))
    corpora = {"code": CorpusEval(0.125, 50, 0.5), HOSTILE: CorpusEval(0.375, 50, None)}
    sink.log_eval(build_eval_record(41, 0.25, 100, 400, 1.0, 1.0, corpora=corpora))
    sink.close("finished")
    page = Page(write_report(run_folder).read_text())
    assert page.tags.count("svg") == 6
    for shown in ("tokens read", "75.0%", "3M", "0.1250", HOSTILE):
        assert shown in page.text


def test_report_with_everything_is_self_contained_and_escaped(run_folder, tmp_path):
    """Mutations caught: an unescaped sample, config or folder name; ids that two figures share; a secret shown."""
    write_baselines(run_folder, [BaselineFit(20, 2000, {"bigram": 4.5}), BaselineFit(40, 4000, {"bigram": 4.25})])
    append_session(run_folder, Session(1.0, 0, 2, {"dp": 2}, {"torch": "2.13.0"}, "abc123", {"parameters": HOSTILE}))
    append_session(run_folder, Session(2.0, 20, 2))
    (run_folder / "sample.txt").write_text(HOSTILE)
    config = {"model": {"family": HOSTILE, "d_model": 64}, "store": {"password": "hush"}}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = write_report(run_folder, tmp_path / "out.html").read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert text.count("alert(1)") == page.text.count("alert(1)") >= 3
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "hush" not in text
    for shown in (
        "run <b>1",
        "resumed at step 20",
        "abc123",
        "bigram, fitted on 4k tokens",
        "-4.0250",
        "d_model 64",
    ):
        assert shown in page.text


def test_run_without_metrics_is_refused(tmp_path):
    for write in (write_report, lambda folder: draw_loss_curve(folder, folder / "loss.png")):
        with pytest.raises(DataError, match=r"metrics\.jsonl has no metrics"):
            write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_loss_curve_is_a_picture(run_folder):
    assert draw_loss_curve(run_folder, run_folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(draw_loss_curve(run_folder, run_folder / "loss.svg")).getroot().tag.endswith("svg")


@pytest.mark.parametrize(("sections", "loss", "shown"), [
    ({"model": {"family": "llama"}}, "nats per token", ("tokens trained on", "tokens/s, median")),
    ({"model": {"family": "bert"}}, "nats per masked token", ("masked tokens trained on",)),
    ({"model": {"family": "vit"}, "data": {"objective": None}}, "nats per image", ("images trained on", "patches/s")),
    ({"model": {"family": "vit"}, "data": {"objective": {"kind": "mae"}}}, "squared error per pixel number",
     ("hidden patches trained on", "patches/s, median")),
])
def test_losses_have_the_unit_of_what_is_learned(run_folder, sections, loss, shown):
    """In the report and in the picture alone. Seen to catch: the family's first objective taken for that of the run."""
    (run_folder / "config.yaml").write_text(yaml.safe_dump(sections))
    text = Page(write_report(run_folder).read_text()).text
    for words in (f"validation loss, {loss}", *shown):
        assert words in text
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert f">loss, {loss}<" in draw_loss_curve(run_folder, run_folder / "loss.svg").read_text()


def test_running_mean_looks_back_only():
    assert running_mean([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]
    assert running_mean([3.0], 5) == [3.0]
