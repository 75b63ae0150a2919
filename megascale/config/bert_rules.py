"""What masked language modelling asks of a config, and numbers that follow from it."""

from collections.abc import Iterable

from megascale.config.schema import RunConfig

MASK_FRACTION = 0.15
"""Devlin et al. 2019, section 3.1."""


def text_tokens(config: RunConfig) -> int:
    """Tokens of text that a row of masked language modelling takes: all but [CLS] and a [SEP] after each segment."""
    return config.train.seq_len - (2 if config.data.objective.pair_task == "none" else 3)


def mask_fraction(config: RunConfig) -> float:
    """`data.objective.mask_fraction` of masked language modelling, resolved."""
    return config.data.objective.mask_fraction or MASK_FRACTION


def masked_tokens(config: RunConfig) -> float:
    """How many tokens of a full row have a label.

    The loss of a row's pair counts as much as those together. Since the engine divides by the number of masked tokens,
    the loss of a batch of full rows is the mean over masked tokens plus the mean over pairs, as in BERT's training; it
    is a constant of the config, so nothing depends on how rows are dealt out.
    """
    return max(1, round(mask_fraction(config) * text_tokens(config)))


def bert_rules(config: RunConfig, world_size: int) -> Iterable[str]:
    """Every rule of masked language modelling that the config breaks."""
    model, data, objective = config.model, config.data, config.data.objective
    has_pairs = objective.pair_task != "none"
    if has_pairs and config.objective_kind != "mlm":
        yield (
            f"data.objective.pair_task = {objective.pair_task} with objective kind {config.objective_kind}: pairs of"
            " segments go with masked language modelling alone; use pair_task: none, or model.family: bert"
        )
    elif has_pairs != model.pair_head:
        yield (
            f"data.objective.pair_task = {objective.pair_task} with model.pair_head = {str(model.pair_head).lower()}:"
            " the head must have the classes that the data has labels for, and no others, since they would learn"
            f" nothing; set model.pair_head: {str(has_pairs).lower()}, or pair_task:"
            f" {'none' if has_pairs else 'nsp or sop'}"
        )
    if config.objective_kind != "mlm":
        return
    if has_pairs and model.num_segments < 2:
        yield (
            f"model.num_segments = {model.num_segments} with data.objective.pair_task = {objective.pair_task}: a pair"
            " has two segments; use num_segments: 2"
        )
    if has_pairs and data.document_mask:
        yield (
            f"data.document_mask with data.objective.pair_task = {objective.pair_task}: the two segments of a row are"
            " to be compared, so attention goes across both; use document_mask: false, or pair_task: none"
        )
    if text_tokens(config) < 2:
        yield f"train.seq_len = {config.train.seq_len} leaves no room for text beside [CLS] and [SEP]; use 5 or more"
    rearranged = [name for name, corpus in data.sources.items() if corpus.fim_fraction]
    if rearranged:
        yield (
            f"data.corpora.{rearranged[0]}.fim_fraction with masked language modelling: filling in the middle is for"
            " models that read left to right; set fim_fraction: 0"
        )
