"""The section that says what a run reads: corpora, their mixture, rows, and where bytes come from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megascale.config.base import Section
from megascale.config.objective import ObjectiveConfig

ONLY_CORPUS = "corpus"
"""Name of the corpus of a run that gives `data.folder` and not `data.corpora`."""
CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class CorpusConfig(Section):
    """One corpus of a blend. Of `weight`, `epochs` and `tokens` one says how much of it is read."""

    folder: str = Field(min_length=1)
    """Folder or url of a tokenized corpus: a local path, `http(s)://`, or `s3://`, `gs://`, `az://` where fsspec has
    their package. `pipe:COMMAND {}` reads a file from a command, where `data.allow_commands` is set."""

    weight: float | None = Field(None, ge=0)
    """Share of the rows, relative to the other weights. 0: not yet, a later stage of the mixture reads it."""

    epochs: float | None = Field(None, gt=0)
    """How often the run reads the corpus, in place of a weight."""

    tokens: int | None = Field(None, ge=1)
    """Tokens of the corpus that the run reads, in place of a weight."""

    max_epochs: float | None = Field(None, gt=0)
    """Refuse a run that would read the corpus more often. Empty, the default: as often as the mixture asks for, which
    `megascale check` prints. Four epochs cost little against fresh tokens (Muennighoff et al. 2023, arXiv
    2305.16264)."""

    fim_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the documents rearranged to fill in the middle; 0, the default, none. Code models use 0.5 to 0.9
    (Bavarian et al. 2022, arXiv 2207.14255)."""

    @model_validator(mode="after")
    def check_share(self) -> Self:
        """Refuses a corpus with no share, or with two."""
        given = [name for name in ("weight", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a corpus of a blend has one of weight, epochs and tokens, here {' and '.join(given) or 'none'}; "
                "give one, such as weight: 1.0"
            )
        return self


class MixtureStageConfig(Section):
    """A change of the mixture during a run."""

    from_step: int = Field(ge=1)
    """The first step that reads the new mixture, counted from 0."""

    weights: dict[CorpusName, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """Share of the rows of each corpus from there on, relative to the others; a corpus not named is not read."""


class FimConfig(Section):
    """How documents are rearranged to fill in the middle, for corpora with a `fim_fraction`."""

    prefix_token: str = "<|fim_prefix|>"
    """Token before the part before the gap. The three tokens must be in the tokenizer."""

    middle_token: str = "<|fim_middle|>"
    """Token before the part that fills the gap."""

    suffix_token: str = "<|fim_suffix|>"
    """Token before the part after the gap."""

    suffix_first_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the rearranged documents that give the suffix before the prefix; the others give the prefix first. Half
    of each trains both uses (Bavarian et al. 2022, arXiv 2207.14255, section 3)."""


class CacheConfig(Section):
    """Where shards from elsewhere are kept on this machine."""

    folder: str | None = None
    """Folder of the cache, which runs and jobs may share. Empty: `megascale/shards` in $XDG_CACHE_HOME or ~/.cache."""

    max_gib: float = Field(100.0, gt=0)
    """Most that the cache takes; the shards read longest ago are deleted first. With `store: ram`: most memory that the
    shards of one corpus take on one rank."""

    shards_ahead: int = Field(4, ge=0)
    """Shards that a rank fetches ahead of use. 4 hide the fetch of 128 MiB each at the speed of one GPU."""


class DataConfig(Section):
    """What the run reads, in which order, and where the bytes come from."""

    folder: str | None = Field(None, min_length=1)
    """Folder or url of the run's only corpus, as `megascale data build` writes it: `train/`, `validation/`,
    `tokenizer.json`. A blend gives `corpora` instead."""

    corpora: dict[CorpusName, CorpusConfig] | None = Field(None, min_length=1)
    """The corpora of a blend, by a name of your choice that logs and the ledger use."""

    stages: Annotated[tuple[MixtureStageConfig, ...], Field(strict=False)] = ()
    """Later mixtures, in the order of their first steps. A stage that hasn't begun may be added, changed or dropped
    when a run is resumed."""

    horizon_steps: int | None = Field(None, ge=1)
    """Steps over which the `epochs` and `tokens` of corpora are spread; train.max_steps when not given. Give it to make
    a run longer later without changing the part already read."""

    packing: Literal["concat", "bestfit", "none"] = "concat"
    """How documents become rows. `concat`, the default: end to end, cut every seq_len tokens; no padding. `bestfit`:
    whole documents fitted into rows, cut only when longer than one (Ding et al. 2024, arXiv 2404.10830). `none`: one
    document a row, padded."""

    document_mask: bool = False
    """Whether attention stays within a document and positions start again at 0 with each. Off, the default: a row is
    one text to the model, as in GPT-2 and GPT-3 (arXiv 2005.14165, section 2.2). Part of what is computed."""

    label_document_starts: bool = True
    """Whether the first token of a document is a label of the last token of the one before it in its row. On, the
    default, is what most runs do; off trains no position on a text that it can't know."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """What the model learns from a row."""

    fim: FimConfig = FimConfig()
    """Fill in the middle, for corpora with a `fim_fraction`."""

    num_lanes: int = Field(64, ge=1)
    """Independent streams that the row order is woven from. Part of the order: a run never changes it. 64 lets up to
    64 nodes each stay on few shards; on one machine it has no effect on speed."""

    window_rows: int = Field(4096, ge=1)
    """Rows of one lane that are shuffled among themselves. Larger mixes better and keeps more shards open."""

    store: Literal["auto", "ram"] = "auto"
    """How shards are held: `auto` maps local files into memory and others through the cache; `ram` fetches each shard
    into memory, for machines without a disk."""

    cache: CacheConfig = CacheConfig()
    """Where shards from elsewhere are kept."""

    fetch_attempts: int = Field(5, ge=1)
    """Times that a fetch is tried, with growing pauses: 5 last 15 s, as long as a load balancer takes to fail over."""

    fetch_timeout_s: float = Field(60.0, gt=0)
    """Seconds without a byte after which a fetch is tried again."""

    allow_commands: bool = False
    """Whether `pipe:` urls may run commands on this machine. Off: a config from elsewhere can't run code."""

    on_bad_shard: Literal["error", "mask"] = "error"
    """What a shard does that can't be read or is damaged: `error` stops the run; `mask` keeps its rows in their places
    without labels, counts them and goes on. Every other row stays where it was."""

    max_masked_rows: int = Field(1000, ge=1)
    """Rows that `on_bad_shard: mask` may mask over the whole run before it stops after all."""

    @model_validator(mode="after")
    def check_corpora(self) -> Self:
        """Refuses a section with no corpus, stages that name none, and shares that can't be told apart."""
        if (self.folder is None) == (self.corpora is None):
            raise ValueError(
                "give data.folder for one corpus, or data.corpora for a blend, not "
                f"{'both' if self.folder else 'neither'}"
            )
        self._check_stages()
        if self.corpora and not any(corpus.weight is None or corpus.weight > 0 for corpus in self.corpora.values()):
            raise ValueError("data.corpora: every weight is 0; the first steps need a corpus to read")
        rearranged = [name for name, corpus in self.sources.items() if corpus.fim_fraction > 0]
        if rearranged and self.packing == "concat":
            raise ValueError(
                f"data.corpora.{rearranged[0]}.fim_fraction with data.packing = concat: documents cut anywhere leave"
                " no room for the three tokens of a rearranged one; use packing: bestfit, which cuts only the longest"
            )
        return self

    def _check_stages(self) -> None:
        if not self.stages:
            return
        if self.corpora is None:
            raise ValueError("data.stages changes the mixture of data.corpora, and there is one data.folder only")
        firsts = [stage.from_step for stage in self.stages]
        if firsts != sorted(set(firsts)):
            raise ValueError(f"data.stages: from_step {firsts} must rise from stage to stage")
        budgets = [name for name, corpus in self.corpora.items() if corpus.weight is None]
        if budgets:
            raise ValueError(
                f"data.corpora.{budgets[0]} has a budget of epochs or tokens, and data.stages change the mixture; give "
                "it a weight, and max_epochs to bound how often it is read"
            )
        for number, stage in enumerate(self.stages):
            unknown = sorted(set(stage.weights) - set(self.corpora))
            if unknown:
                raise ValueError(
                    f"data.stages.{number}.weights names {unknown[0]!r}, which isn't in data.corpora:"
                    f" {', '.join(sorted(self.corpora))}"
                )
            if not any(stage.weights.values()):
                raise ValueError(f"data.stages.{number}.weights: every weight is 0")

    @property
    def sources(self) -> dict[str, CorpusConfig]:
        """The corpora by name, in the order of their names, on which the row order is built."""
        if self.corpora is None:
            return {ONLY_CORPUS: CorpusConfig(folder=self.folder or "", weight=1.0)}
        return dict(sorted(self.corpora.items()))
