"""What retention promises, for any checkpoints and any rule."""

from hypothesis import given
from hypothesis import strategies as st

from megascale.checkpoint.retention import Kept, Retention, plan_deletions, reasons_to_keep

LOSSES = st.none() | st.floats(0, 20)
PRESENT = st.dictionaries(st.integers(0, 60), LOSSES, max_size=12).flatmap(
    lambda losses: st.permutations([Kept(step, loss) for step, loss in losses.items()])
)
POLICIES = st.builds(Retention, last=st.integers(1, 5), every_steps=st.integers(0, 20), best=st.integers(0, 4))


@given(PRESENT, POLICIES)
def test_what_the_rule_names_stays_and_the_rest_goes(present, policy):
    """Each reason is checked against the words of the rule; what has none goes.

    Mutation: sorting by loss without leaving out those that weren't evaluated; `best` taken from the highest.
    """
    deleted = plan_deletions(present, policy)
    assert deleted == sorted(set(deleted))
    for kept in present:
        newer = sum(other.step > kept.step for other in present)
        is_multiple = policy.every_steps > 0 and kept.step % policy.every_steps == 0
        is_best = kept.validation_loss is not None and policy.best > sum(
            (other.validation_loss, other.step) < (kept.validation_loss, kept.step)
            for other in present if other.validation_loss is not None
        )
        assert (kept.step in deleted) == (newer >= policy.last and not is_multiple and not is_best)
        assert reasons_to_keep(present, policy)[kept.step] == tuple(
            name for name, holds in (("last", newer < policy.last), ("every", is_multiple), ("best", is_best)) if holds
        )


@given(PRESENT, POLICIES)
def test_the_newest_always_stays(present, policy):
    """Mutation: `ordered[-policy.last:-1]` deletes it."""
    if present:
        assert max(kept.step for kept in present) not in plan_deletions(present, policy)


@given(PRESENT, POLICIES)
def test_deleting_twice_deletes_nothing_more(present, policy):
    """A save that follows another, or `prune` after a save, finds the work done.

    Mutation: `every_steps` that counts checkpoints instead of steps.
    """
    deleted = plan_deletions(present, policy)
    assert plan_deletions([kept for kept in present if kept.step not in deleted], policy) == []


@given(PRESENT, POLICIES, POLICIES)
def test_a_laxer_rule_keeps_all_that_a_stricter_one_keeps(present, policy, other):
    lax = Retention(max(policy.last, other.last), policy.every_steps, max(policy.best, other.best))
    strict = Retention(min(policy.last, other.last), policy.every_steps, min(policy.best, other.best))
    assert set(plan_deletions(present, lax)) <= set(plan_deletions(present, strict))


@given(st.lists(st.tuples(st.integers(1, 3), LOSSES), max_size=20), POLICIES)
def test_over_a_whole_run_the_rule_holds_of_all_that_was_ever_saved(saves, policy):
    """Deleting after each save loses nothing that the rule would keep of the whole run: a best one stays a best one.

    Mutation: as above; `best` among the newer half alone.
    """
    saved, there = [], []
    for distance, loss in saves:
        newest = Kept((saved[-1].step if saved else 0) + distance, loss)
        saved.append(newest)
        deleted = plan_deletions([*there, newest], policy)
        there = [kept for kept in [*there, newest] if kept.step not in deleted]
    assert there == [kept for kept in saved if kept.step not in plan_deletions(saved, policy)]
