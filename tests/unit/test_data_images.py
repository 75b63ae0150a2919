"""Images: their shards as any WebDataset reader sees them, what is drawn for them, and what damage does."""

import io
import json
import shutil

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.count import count_rows
from data_tools.images import build_images
from data_tools.index import rebuild_index
from data_tools.inspect import describe_corpus_row
from data_tools.verify import verify_corpus
from megascale.config.batch_plan import constant_batch
from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.data.images import ImageObjective, decode_image, decode_sample, plain, random_box
from megascale.data.loader import Loader, evaluation_batches
from megascale.data.manifest import load_manifest
from megascale.data.permutation import derive_key
from megascale.data.row import Picture, Row
from megascale.data.row_counts import count_command
from megascale.data.rows import check_batches
from megascale.data.stream import open_stream, open_validation
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_corpus

NUM_IMAGES, NUM_CLASSES, SIDE = 40, 3, 8


def encoded(number: int, kind: str = "PNG") -> bytes:
    """An image of 10 x 12 pixels whose upper left pixel has the value of its number."""
    pixels_HWC = np.random.default_rng(number).integers(0, 256, (10, 12, 3), np.uint8)
    pixels_HWC[0, 0] = number
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of several shards, made of class folders."""
    base = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        path = base / "source" / f"class_{number % NUM_CLASSES}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, "JPEG" if number % 5 == 0 else "PNG"))
    build_images(str(base / "source"), base / "corpus", 0.25, 0, 6000, False, QUIET)
    return base / "corpus"


def run_config(folder, **data):
    vision = {"image_size": SIDE, "patch_size": 2, "channels": 3}
    return parse_config({
        "run": {"name": "images", "folder": "unused", "seed": 3},
        "model": {"family": "vit", "num_layers": 1, "d_model": 8, "num_heads": 2, "vocab_size": NUM_CLASSES,
                  "max_seq_len": 16, "vision": vision},
        "data": {"folder": str(folder), "packing": "none"} | data,
        "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_tokens": 128, "max_steps": 5},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "evaluate": {"interval_steps": 10}, "checkpoint": {"interval_steps": 10},
    }, "test")


def open_loader(config, replica: int = 0, num_replicas: int = 1) -> Loader:
    derived = derive(config, num_replicas)
    return Loader(open_stream(config, derived), derived.batches, 2, replica, num_replicas)


def test_shards_are_stock_webdatasets_and_verified(folder):
    manifests = verify_corpus(folder, QUIET)
    assert [manifest.split for manifest in manifests] == ["train", "validation"]
    assert sum(manifest.num_documents for manifest in manifests) == NUM_IMAGES
    assert manifests[0].num_shards > 2
    tars = [manifests[0].shard_place(position) for position in range(manifests[0].num_shards)]
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    corpus = open_stream(run_config(folder), derive(run_config(folder), 1)).corpora[0]
    assert len(read) == corpus.num_rows
    for number, sample in enumerate(read):
        row = corpus.read(*corpus.locate_unshuffled(number))
        (pixels_HWC,) = (value for key, value in sample.items() if key in ("jpg", "png"))
        assert sample["cls"] == row.picture.label
        assert np.array_equal(pixels_HWC, row.picture.pixels_HWC)
    assert json.loads((folder / "classes.json").read_text())["classes"] == ["class_0", "class_1", "class_2"]


def test_a_corpus_made_again_from_its_own_shards_has_the_same_images(folder, tmp_path):
    build_images(str(folder / "train"), tmp_path / "again", 0, 0, 6000, False, QUIET)
    first, again = (load_manifest(str(place), "train") for place in (folder, tmp_path / "again"))
    assert (first.num_documents, first.vocab_size) == (again.num_documents, again.vocab_size)
    verify_corpus(tmp_path / "again", QUIET)


def test_every_replica_and_resume_reads_the_same_images(folder):
    """Rows, crops and mirrors are functions of the seed and the row."""
    config = run_config(folder, objective={"crop_min_fraction": 0.3, "flips": True})
    whole = open_loader(config).make_step(3)
    parts = [open_loader(config, replica, 2).make_step(3) for replica in range(2)]

    def by_row(steps) -> dict:
        return {int(number): (image.numpy().tobytes(), int(label)) for step in steps for batch in step.micro_batches
                for number, image, label in zip(batch.row_numbers_B, batch.images_BCHW, batch.labels_BT, strict=True)}

    assert by_row([whole]) == by_row(parts)
    sums = [step.counts.digest_sum for step in (whole, *parts)]
    assert sums[0] == sum(sums[1:])
    assert len({image for image, _ in by_row([whole]).values()}) == 8


def test_an_epoch_reads_every_image_once(folder):
    corpus = open_stream(run_config(folder), derive(run_config(folder), 1)).corpora[0]
    stream = open_stream(run_config(folder), derive(run_config(folder), 1))
    read = stream.read(np.arange(corpus.num_rows))
    assert len({row.tokens.tobytes() for row in read.rows}) == corpus.num_rows
    assert sum(row.new_tokens for row in read.rows) == corpus.manifest.num_tokens


def test_validation_images_are_neither_cropped_nor_mirrored(folder):
    """Caught mutation: the objective of training."""
    config = run_config(folder, objective={"crop_min_fraction": 0.3, "flips": True})
    stream, (corpus,) = open_stream(config, derive(config, 1)), open_validation(config)
    batches = list(evaluation_batches(corpus, stream.objective, 4, 0, 1))
    assert sum(int((batch.labels_BT >= 0).sum()) for batch in batches) == corpus.num_rows
    row = corpus.read(*corpus.locate_unshuffled(0))
    square = Image.fromarray(row.picture.pixels_HWC[:, 1:11]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    expected_CHW = (np.asarray(square, np.float32).transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(batches[0].images_BCHW[0].numpy(), expected_CHW, atol=1e-6)


def test_random_parts_are_of_the_size_and_shape_asked_for():
    boxes = [random_box((200, 150), 0.2, key) for key in derive_key(7, np.arange(400)).tolist()]
    widths, heights = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes]).T
    assert all(0 <= left < right <= 200 and 0 <= top < bottom <= 150 for left, top, right, bottom in boxes)
    shares = widths * heights / (200 * 150)
    assert shares.min() >= 0.19
    assert shares.max() <= 1
    assert 0.45 < shares.mean() < 0.65
    assert (widths / heights).min() > 0.74
    assert (widths / heights).max() < 1.35
    assert len(set(boxes)) > 390
    assert random_box((300, 10), 0.9, 5) == (145, 0, 155, 10)


def test_masks_hide_as_many_patches_of_every_row_and_others_of_each():
    objective = ImageObjective(8, 2, 1, 4, 1.0, False, (0.0,), (1.0,))
    pixels_HWC = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    rows = [Row(np.zeros(1, np.uint8), [1], 1, picture=Picture(pixels_HWC, 0))] * 50
    arrays = objective.assemble([*rows, None], derive_key(1, np.arange(51)))
    hidden_BT = arrays.labels_BT == 0
    assert (hidden_BT[:-1].sum(axis=1) == 12).all()
    assert not hidden_BT[-1].any()
    assert (arrays.images_BCHW[-1] == 0).all()
    assert len({row.tobytes() for row in hidden_BT[:-1]}) > 45
    assert (np.abs(hidden_BT[:-1].mean(axis=0) - 0.75) < 0.25).all()
    np.testing.assert_allclose(arrays.images_BCHW[0, 0], pixels_HWC[..., 0] / 255, rtol=1e-6)
    flipped = ImageObjective(8, 2, 1, 4, 1.0, True, (0.0,), (1.0,))
    images_BHW = flipped.assemble(rows, derive_key(1, np.arange(50))).images_BCHW[:, 0]
    mirrored = (images_BHW[:, 0, 0] > images_BHW[:, 0, -1]).sum()
    assert 10 < mirrored < 40
    assert plain(flipped) == objective


def test_a_bad_image_is_masked_or_stops_the_run(folder, tmp_path):
    """Its checksums are good, its pixels aren't."""
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    for number in range(12):
        content = encoded(number)
        source.joinpath(f"{number}.png").write_bytes(content[: len(content) // 2] if number == 4 else content)
    build_images(str(source.parent), tmp_path / "corpus", 0, 0, 1 << 20, False, QUIET)
    config = run_config(tmp_path / "corpus", on_bad_shard="mask")
    loader = open_loader(config)
    steps = [loader.make_step(step) for step in range(2)]
    (reason,) = {fault.reason for step in steps for fault in step.faults}
    assert "isn't an image that can be decoded" in reason
    masked = sum(int((batch.labels_BT < 0).sum()) for step in steps for batch in step.micro_batches)
    assert masked == sum(step.counts.read[0].masked_rows for step in steps) >= 1
    strict = open_loader(run_config(tmp_path / "corpus"))
    with pytest.raises(DataError, match=r"shard-000000.tar, image \d+: isn't an image"):
        [strict.make_step(step) for step in range(2)]
    with pytest.raises(DataError, match="isn't an image"):
        verify_corpus(tmp_path / "corpus", QUIET)


def test_a_flipped_bit_is_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "corpus")
    place = next((tmp_path / "corpus" / "train").glob("*.tar"))
    content = bytearray(place.read_bytes())
    content[1600] ^= 1
    place.write_bytes(content)
    with pytest.raises(DataError, match="block 0: crc32 of the tokens is"):
        verify_corpus(tmp_path / "corpus", QUIET)


def test_an_index_is_made_again_from_the_shards(folder, tmp_path):
    """Caught mutation: the type of tokens."""
    shutil.copytree(folder, tmp_path / "corpus")
    lost = sorted((tmp_path / "corpus").glob("*/index.json")) + sorted((tmp_path / "corpus").glob("*/shards.npy"))
    before = {path: path.read_bytes() for path in lost}
    for path in lost[1:]:  # one index is there still, without its table
        path.unlink()
    rebuild_index(tmp_path / "corpus", QUIET)
    assert {path: path.read_bytes() for path in lost} == before
    verify_corpus(tmp_path / "corpus", QUIET)
    (tmp_path / "corpus" / "train" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"1 shards are missing, such as shard-000001\.tar"):
        rebuild_index(tmp_path / "corpus", QUIET)
    (tmp_path / "corpus" / "classes.json").write_text("[]")
    with pytest.raises(DataError, match=r"classes\.json has no list of classes"):
        rebuild_index(tmp_path / "corpus", QUIET)


def test_messages_about_rows_are_of_images(folder):
    stream = open_stream(run_config(folder), derive(run_config(folder), 1))
    num_rows, corpus = stream.corpora[0].num_rows, stream.corpora[0]
    budget = rf"{num_rows // 2 * 2} x train\.seq_len or less"
    message = rf"index\.json: {num_rows} rows, fewer than the 64 .* to {budget} or build the corpus from more images$"
    with pytest.raises(DataError, match=message):
        check_batches(stream.corpora, constant_batch(64), 2, 1)
    assert count_command(corpus.manifest, corpus.packing) == f"megascale data index {folder}"
    with pytest.raises(DataError, match="of images, and says how many there are"):
        count_rows(folder, 16, "none", False)


def test_refusals_name_the_way_out(folder, tmp_path):
    for content, refused in ((b"no image", "isn't an image"), (encoded(3)[:60], "isn't an image")):
        with pytest.raises(DataError, match=refused):
            decode_image(content, "here")
    sample = np.frombuffer(b"00000009" + bytes(1016) + encoded(1), np.uint8)
    assert decode_sample(sample, 10, "here").label == 9
    with pytest.raises(DataError, match="not a number below 9"):
        decode_sample(sample, 9, "here")
    with pytest.raises(DataError, match="holds no images; give a folder"):
        build_images(str(tmp_path), tmp_path / "out", 0, 0, 1 << 20, False, QUIET)
    text = make_corpus(tmp_path / "text", vocab_size=NUM_CLASSES)
    with pytest.raises(DataError, match=r"holds text, which model\.family = vit doesn't read"):
        open_stream(run_config(text), derive(run_config(text), 1))


def test_a_row_is_shown_as_a_sketch(folder):
    shown = describe_corpus_row(folder, "train", 2, 256, "concat", None).splitlines()
    assert "image 2: class" in shown[0]
    assert "12 x 10 pixels of 3 colours" in shown[0]
    assert len(shown) == 11
