"""Many threads on one model: each gets the vectors of one thread, and none sees another's options or mode."""

import copy
import functools
import gc
import itertools
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel, BifocalProcessor, BifocalTextForMaskedLM, encoding_bifocal, image_bifocal
from bifocal.modeling.processing_bifocal import private_tokenizer, token_ids
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo

WORDS = " ".join(TEXTS).split()
LENGTHS = (0, 1, 3, 8, 30, 61, 62, 63, 200)
MIXED = [
    " ".join(itertools.islice(itertools.cycle(WORDS[start:] + WORDS[:start]), n)) for start, n in enumerate(LENGTHS)
]


@pytest.fixture(autouse=True)
def one_core_per_thread() -> Iterator[None]:
    """Eight threads that each want all cores take far longer than eight that want one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def meanwhile(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Repeat work in another thread until the block ends; what it raised is raised here."""
    done = threading.Event()
    results: list[Any] = []

    def repeat() -> None:
        while not done.is_set():
            results.append(work())

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(repeat)
        try:
            yield results
        finally:
            done.set()
    running.result()


def in_threads(calls: list[Callable[[], Any]], times: int) -> list[list[Any]]:
    """Run the calls in turn, `times` in all, in 8 threads, and return the results of each call."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: calls[number % len(calls)](), range(times)))
    return [found[start :: len(calls)] for start in range(len(calls))]


def assert_as_alone(calls: list[Callable[[], Any]], times: int) -> None:
    expected = [np.asarray(call()) for call in calls]
    for number, (right, results) in enumerate(zip(expected, in_threads(calls, times), strict=True)):
        for result in results:
            np.testing.assert_allclose(np.asarray(result), right, atol=1e-6, err_msg=f"call {number}")


def mixed_calls(model: BifocalModel) -> list[Callable[[], Any]]:
    """Single and several texts and images, of all lengths and with every option."""
    calls = [functools.partial(model.encode_text, text) for text in MIXED]
    for options in (
        {"max_length": 5}, {"max_length": 3, "normalize": False}, {"truncate_dim": 7, "convert_to": "torch"},
        {"convert_to": "list", "batch_size": 2}, {"max_length": 40, "truncate_dim": 9, "normalize": False},
    ):  # fmt: skip
        calls += [functools.partial(model.encode_text, texts, **options) for texts in (MIXED[3:6], MIXED[4], MIXED[-1])]
    lazy = photo(50, 33)
    calls += [functools.partial(model.encode_image, images) for images in (lazy, [photo(), lazy], np.asarray(lazy))]
    return calls


def test_eight_threads_get_the_vectors_of_one(model):
    """Also while another thread switches the truncation and padding of the same tokenizer."""
    tokenizer = model.processor.tokenizer
    options = itertools.cycle(
        ({"truncation": True, "max_length": 4, "padding": "max_length"}, {"padding": True}, {"truncation": False})
    )
    with meanwhile(lambda: len(tokenizer(MIXED, **next(options), verbose=False)["input_ids"])) as switched:
        assert_as_alone(mixed_calls(model), 2000)
    assert set(switched) == {len(MIXED)}
    assert not hasattr(model, "_one_at_a_time")


def test_encoding_during_training(processor):
    """Who trains never sees the model in eval mode, and who encodes never has dropout."""
    torch.manual_seed(0)
    model = BifocalModel(small_config(text_config={"hidden_dropout_prob": 0.5}, vision_config={"patch_dropout": 0.5}))
    model.processor = processor
    model.vision_model.norm.eval()
    model.train()
    ids = torch.tensor([[2, 7, 9, 3]] * 2)

    def train() -> tuple[bool, bool, bool]:
        """Switches as a Trainer does when it evaluates, and looks at its modes at every moment between."""
        modes = [all(module.training for module in model.modules()) for _ in range(20)]
        model.eval()
        eval_modes = [not any(module.training for module in model.modules()) for _ in range(5)]
        model.train()
        twice = model.get_text_features(ids).pooler_output
        return all(modes), all(eval_modes), bool((twice[0] != twice[1]).any())

    with meanwhile(train) as seen:
        calls = [functools.partial(model.encode_text, MIXED, batch_size=2), lambda: model.encode_image([photo()] * 3)]
        assert_as_alone(calls, 100)
    assert len(seen) > 2
    assert set(seen) == {(True, True, True)}


def test_flex_attention_in_threads(model):
    """Nothing of the whole process is switched while it runs on a CPU."""
    model.set_attn_implementation("flex_attention")
    assert_as_alone([functools.partial(model.encode_text, text) for text in MIXED[1:6]], 100)
    graphs: list[Any] = []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    compiled(torch.ones(1))
    assert graphs, "what other code compiles is no longer compiled"


def test_the_processor_is_loaded_once(saved, monkeypatch):
    loads = []
    load = BifocalProcessor.from_pretrained
    monkeypatch.setattr(BifocalProcessor, "from_pretrained", lambda *a, **k: (loads.append(1), load(*a, **k))[1])
    model = BifocalModel.from_pretrained(saved)
    (results,) = in_threads([lambda: model.encode_text("black star")], 8)
    np.testing.assert_allclose(results, np.stack([results[0]] * 8), atol=1e-6)
    assert len(loads) == 1


def test_a_model_is_pickled_copied_and_given_another_processor(model, tmp_path):
    before = model.encode_text(MIXED)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_allclose(again.encode_text(MIXED), before, atol=1e-6)
    other = copy.deepcopy(model.processor.tokenizer)
    other.add_tokens(["black star"])
    model.processor = BifocalProcessor(model.processor.image_processor, other)
    assert not np.allclose(model.encode_text("black star"), before[0])
    assert len(other("black star")["input_ids"]) == 3
    model.resize_token_embeddings(len(other))
    changed = model.encode_text("black star")
    other.add_tokens(["omega"])  # the same object, changed
    assert len(token_ids(private_tokenizer(other), ["omega"], 64)[0][0]) == 3
    np.testing.assert_allclose(model.encode_text("black star"), changed, atol=1e-6)


def byte_tokenizer(side: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.train_from_iterator(
        MIXED, trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", truncation_side=side
    )


@pytest.mark.parametrize("kind", ["wordpiece", "added", "left", "right", "no special tokens"])
def test_token_ids_are_those_of_truncation(processor, kind):
    tokenizer = copy.deepcopy(processor.tokenizer)
    if kind not in ("wordpiece", "added"):
        tokenizer = byte_tokenizer("left" if kind == "left" else "right")
    if kind == "no special tokens":
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    if kind == "added":
        tokenizer.add_tokens([AddedToken("black star", normalized=False), "omega"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
        tokenizer.add_tokens(["heavy"])
    texts = [*MIXED, "black star <x> omega [SEP] heavy [MASK] unheard-of ☃"]
    tokenizer(texts, truncation=True, max_length=5, padding="max_length")  # what another thread may leave behind
    state = (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding)
    private = private_tokenizer(tokenizer)
    found = {length: token_ids(private, texts, length) for length in (3, 4, 17, 64, 10_000)}
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == state
    whole = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    for length, (ids, lengths) in found.items():
        assert ids == tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        assert lengths == whole


@pytest.fixture(scope="module")
def sentences(processor, tmp_path_factory) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    processor.tokenizer("a")  # switches off what earlier calls left in it: it would be saved
    torch.manual_seed(0)
    folder = export_model(BifocalModel(small_config()), tmp_path_factory.mktemp("exported") / "small", processor)
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def test_sentence_transformers_in_threads(sentences):
    """It tokenizes with our processor, whose padding is that of each call's longest text."""
    model = sentences[0].model
    model.processor = sentences[0].processor
    batches = [[text] for text in MIXED] + [MIXED, MIXED[2:4]]
    calls = [functools.partial(sentences.encode, batch, show_progress_bar=False) for batch in batches]
    for batch, call in zip(batches, calls, strict=True):
        np.testing.assert_allclose(call(), model.encode_text(batch), atol=1e-6)
    switch = functools.partial(sentences[0].processor, text=MIXED, truncation=True, max_length=4, padding="max_length")
    with meanwhile(lambda: len(switch()["input_ids"][0])) as switched:
        assert_as_alone([*calls, functools.partial(model.encode_text, MIXED[-1], max_length=5)], 400)
    assert set(switched) == {4}


def test_models_loaded_by_threads_are_whole(tmp_path):
    """transformers replaces methods of its classes while it loads; two loads at once left weights untied for good."""
    masked = BifocalTextForMaskedLM(small_config().text_config)
    masked.save_pretrained(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: BifocalTextForMaskedLM.from_pretrained(tmp_path), range(12)))
    for model in [*loaded, BifocalTextForMaskedLM.from_pretrained(tmp_path)]:
        assert model.lm_head.decoder.weight is model.get_input_embeddings().weight


def test_a_model_that_was_used_is_freed_at_once(processor):
    """Its weights would stay on a GPU until Python collects garbage."""
    model = BifocalModel(small_config()).eval()
    model.processor = processor
    weight = weakref.ref(next(model.parameters()))
    gc.collect()
    gc.disable()
    try:
        model.encode_text("star")
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_waits_for_no_lock():
    """A data worker is forked while another thread reads an image or loads a processor."""
    with ExitStack() as held:
        for lock in (*image_bifocal._READING, *image_bifocal._STREAMS, encoding_bifocal._LOADING):
            held.enter_context(lock)
        child = os.fork()
        if child == 0:
            locks = (*image_bifocal._READING, *image_bifocal._STREAMS, encoding_bifocal._LOADING)
            os._exit(1 if len(locks) != 33 or any(lock.locked() for lock in locks) else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
