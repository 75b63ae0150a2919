"""One rank of `bench.comm_volume`: takes two steps in each layout and compares what the second sends with the forms.

Argument: {"cases": names, "prints": "table" or "json"} as JSON. Rank 0 prints Markdown tables; or every rank prints a
list of {name, rank, counted, expected}, whose last two are lists of [axis, kind, bytes].
"""

import json
import os
import sys
from collections import Counter

import torch
import torch.distributed as dist

from bench.comm_counter import CommCounter
from bench.comm_forms import Term, all_terms
from bench.comm_volume import CASES
from bench.figures import show_head, show_row
from bench.layout_cases import LayoutCase
from bench.layout_run import build_case_engine, take_step
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info

Sent = Counter[tuple[str, str]]
"""(axis, kind) -> bytes of a rank in a step."""
COLUMNS = ("axis", "collective", "what", "closed form", "bytes", "counted", "beyond the paper, because")


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Name of each process group -> name of the axis; a group that tp is split into is found by its members."""
    axes = {axis: getattr(mesh, axis).name for axis in ("tp", "cp", "pp", "ep", "ends")}
    groups = {"experts": mesh.expert_group, "zero": mesh.zero_group, "loss": mesh.loss_group,
              "model": mesh.model_group, "world": mesh.world_group, "control": mesh.control_group}
    names = {name: axis for axis, name in axes.items() if name}
    return names | {group.group_name: axis for axis, group in groups.items()}


def count_step(case: LayoutCase, mesh: Mesh) -> Sent:
    """What this rank sends in the second step; the first one sets things up."""
    engine = build_case_engine(case, mesh)
    take_step(engine, case, 0)
    counter = CommCounter(axis_names(mesh))
    with counter:
        take_step(engine, case, 1)
    known = set(axis_names(mesh).values())
    sent: Sent = Counter()
    for (axis, kind), size in counter.sent.items():
        # Over gloo our reduce-scatter is an all-to-all and a sum; the real ones are those of cp and ep.
        is_scatter = kind == "all_to_all" and axis not in ("cp", "ep")
        sent[axis if axis in known else "kv", "reduce_scatter" if is_scatter else kind] += size
    if mesh.ep.size > 1:
        mean = torch.tensor(sent["ep", "all_to_all"] / mesh.ep.size, dtype=torch.float64)
        dist.all_reduce(mean, group=mesh.ep.group)  # what one rank doesn't send another does
        sent["ep", "all_to_all"] = mean.item()
    return sent


def expected_sent(terms: list[Term]) -> Sent:
    """The forms' bytes by axis and kind."""
    sent: Sent = Counter()
    for term in terms:
        sent[term.axis, term.kind] += term.sent
    return sent


def table(case: LayoutCase, terms: list[Term], counted: Sent) -> str:
    """The terms of one rank, each sum beside what was counted."""
    lines = [f"### {case.name}", "", show_head(COLUMNS)]
    shown = set()
    for term in terms:
        key = term.axis, term.kind
        found = "" if key in shown else f"{counted[key]:,.0f}"
        shown.add(key)
        lines.append(show_row((term.axis, term.kind, term.what, f"`{term.formula}`", f"{term.sent:,.0f}", found,
                               term.reason)))
    paper, ours = sum(term.sent for term in terms if not term.reason), sum(counted.values())
    return "\n".join([*lines, "", f"Sum {ours:,.0f}, {ours / paper:.3f} x the papers' {paper:,.0f}.", ""])


def main() -> None:
    options = json.loads(sys.argv[1])
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=120)
    torch.set_num_threads(1)
    results = []
    for case in (CASES[name] for name in options["cases"]):
        mesh = lay_out_mesh(case.layout(), info.rank, device)
        counted, terms = count_step(case, mesh), all_terms(case, info.rank)
        expected = expected_sent(terms)
        results.append({"name": case.name, "rank": info.rank} | {
            kind: [[*key, size] for key, size in sorted(sent.items())]
            for kind, sent in (("counted", counted), ("expected", expected))
        })
        if options["prints"] == "table":
            if mesh.rank == 0:
                print(table(case, terms, counted), flush=True)
            (differing,) = mesh.control_sum([int(counted != expected)])
            assert not differing, f"{case.name}: {differing} ranks differ from the forms: {results[-1]}"
    if options["prints"] == "json":
        print(json.dumps(results), flush=True)
    dist.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
