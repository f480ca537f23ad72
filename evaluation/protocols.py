"""What is measured and how: retrieval across modalities, zero-shot classification, texts among themselves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bifocal.data.skips import Fault, Skip
from bifocal.errors import EvaluationError
from bifocal.evaluation.encoders import Encoder
from bifocal.evaluation.failures import worst_searches
from bifocal.evaluation.labels import class_names, class_numbers, is_unlabelled
from bifocal.evaluation.relevance import caption_answers, content_ids, right_answers, shared_rows
from bifocal.evaluation.retrieval import recall_at, relevant_ranks, retrieval_metrics
from bifocal.evaluation.rows import Chosen, Rows, several

# A photo's class in a sentence; the mean of the sentences' embeddings is the class's (arXiv 2103.00020, section 3.1.4).
TEMPLATES = (
    "a photo of a {}.", "a good photo of a {}.", "a close-up photo of a {}.", "a photo of the {}.",
    "a blurry photo of a {}.", "a picture of a {}.", "an image of a {}.",
)  # fmt: skip


@dataclass
class Result:
    """What a model reaches on one data set.

    Args:
        task, kind: name of the data set, and the protocol.
        metrics: by name; `main` is the one that stands for all.
        sizes: of the data, such as images and captions; `shared rows` is the number of rows that share a text or an
            image with another one and count as right answers of each other.
        skips: rows that could not be used, by name, with the cause.
        arrays: what the report draws of: embeddings, ranks, similarities.
        examples: the worst searches, see `evaluation.examples`.
        rows: a digest of the rows that were given, to tell whether two models were measured on the same ones.
    """

    task: str
    kind: str
    main: str
    metrics: dict[str, float]
    sizes: dict[str, int]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    seconds: float = 0.0
    parameters: int = 0
    speed: dict[str, float] = field(default_factory=dict)
    rows: str = ""

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were skipped, by cause."""
        return dict(Counter(skip.cause for skip in self.skips))


def image_text_retrieval(
    encoder: Encoder,
    name: str,
    images: Sequence[Any],
    captions: Sequence[Sequence[str] | str],
    ks: Sequence[int] = (1, 5, 10),
    names: Sequence[str] | None = None,
) -> Result:
    """Search images by text and texts by image; both definitions of recall where images have several captions.

    Equal texts and equal images (by their pixels) are right answers of each other. Rows whose image or captions cannot
    be used are skipped and named in the result.

    Args:
        images: whatever `load_image` reads, or a column of a `datasets.Dataset`.
        captions: of each image one or several. COCO and Flickr30k are usually reported on Karpathy's test splits of
            5,000 and 1,000 images with five captions each.
        ks: those larger than a side has items are left out there.
        names: of the rows, for what is said about skipped ones; their numbers when None.

    Raises:
        EvaluationError: if images and captions differ in number, or there is nothing to evaluate on.
    """
    rows = Rows(name, names, images=images, captions=captions)
    groups = rows.texts("captions", "caption")
    vectors, digests = rows.images(encoder)
    rows.require_some()
    images, good = rows.columns["images"], rows.good
    texts = [text for number in good for text in groups[number]]
    owner = np.repeat(np.arange(len(good)), [len(groups[number]) for number in good])
    image_vectors, text_vectors = np.stack([vectors[number] for number in good]), encoder.texts(texts)
    text_ids, image_ids = content_ids(texts), content_ids([digests[number] for number in good])
    images_of, texts_of = caption_answers(owner, text_ids, image_ids)
    to_image = relevant_ranks(text_vectors, image_vectors, images_of, max([1, *ks]))
    to_text = relevant_ranks(image_vectors, text_vectors, texts_of, max([1, *ks]))
    metrics: dict[str, float] = {}
    for direction, ranks, items, right in (
        ("text_to_image", to_image, len(good), images_of), ("image_to_text", to_text, len(texts), texts_of),
    ):  # fmt: skip
        found = retrieval_metrics(ranks, [k for k in ks if k <= items] or [1], items, _counts(right))
        metrics |= {f"{direction}/{metric}": value for metric, value in found.items()}
    k = 5 if min(len(good), len(texts)) >= 5 else 1
    metrics["mean_recall"] = (recall_at(to_image, k) + recall_at(to_text, k)) / 2
    # Of the ranks of all right items only the first is drawn; texts that many images share have many.
    arrays = {
        "images": image_vectors, "texts": text_vectors, "owner": owner, "to_image": to_image[:, :1],
        "to_text": to_text[:, :1], "text_ids": text_ids, "image_ids": image_ids,
    }  # fmt: skip
    sizes = {
        "images": len(good), "captions": len(texts), "shared rows": shared_rows(owner, text_ids, image_ids),
        "dimensions": image_vectors.shape[1],
    }  # fmt: skip
    examples = worst_searches(
        Chosen(images, good), texts, owner, image_vectors, text_vectors, to_image, to_text, images_of, texts_of
    )
    return _with_skips(Result(name, "image-text retrieval", "mean_recall", metrics, sizes, arrays, examples), rows)


def _counts(right: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([len(numbers) for numbers in right])


def _with_skips(result: Result, *several_rows: Rows) -> Result:
    result.skips = [skip for rows in several_rows for skip in rows.skips]
    return result


def zero_shot(
    encoder: Encoder, name: str, images: Sequence[Any], labels: Sequence[int] | Sequence[str],
    classes: Sequence[str] | None = None, templates: Sequence[str] = TEMPLATES, names: Sequence[str] | None = None,
) -> Result:  # fmt: skip
    """Classify images by the nearest class name, each in several sentences (arXiv 2103.00020).

    Args:
        images: whatever `load_image` reads.
        labels: numbers of classes, or their names. Rows without a label (None, or -1 as in unlabelled splits of the
            Hub) are skipped.
        classes: names by number; those of a `ClassLabel` column, or the different labels, when None.
        templates: sentences with `{}` in the place of a name.
        names: of the rows, for what is said about skipped ones.

    Raises:
        EvaluationError: if there are fewer than two classes, a label without a class, classes without names, or
            nothing to evaluate on.
    """
    rows = Rows(name, names, images=images, labels=labels)
    classes = class_names(name, labels, classes)
    sentences = several(name, "templates", templates)
    if not len(sentences) or not all(isinstance(one, str) and "{}" in one for one in sentences):
        raise EvaluationError(f"Each template of '{name}' needs {{}} where the name of the class stands.")
    if len(set(classes)) < 2:
        raise EvaluationError(f"'{name}' has {rows.count} images of {len(classes)} classes; it takes two at least.")
    numbers = class_numbers(rows, classes)
    vectors, _ = rows.images(encoder)
    rows.require_some()
    target = np.array([numbers[number] for number in rows.good])
    prompts = [template.format(one) for one in classes for template in sentences]
    class_vectors = encoder.texts(prompts).reshape(len(classes), len(sentences), -1).mean(axis=1)
    class_vectors /= np.linalg.norm(class_vectors, axis=1, keepdims=True)
    image_vectors = np.stack([vectors[number] for number in rows.good])
    scores = image_vectors @ class_vectors.T
    # Classes of one name cannot be told apart, and are right answers of each other.
    relevant = right_answers(range(len(target)), classes, enumerate(target.tolist()))
    ranks = relevant_ranks(image_vectors, class_vectors, relevant, first=1)[:, 0]
    hit = ranks == 1
    metrics = {"accuracy": float(hit.mean())}
    if len(classes) > 5:
        metrics["accuracy@5"] = float((ranks <= 5).mean())
    metrics["mean_per_class"] = float(np.mean([hit[target == c].mean() for c in np.unique(target)]))
    sizes = {"images": len(target), "classes": len(classes), "prompts": len(sentences)}
    result = Result(name, "zero-shot classification", "accuracy", metrics, sizes, {"scores": scores, "labels": target})
    return _with_skips(result, rows)


def linear_probe(
    encoder: Encoder, name: str, train: tuple[Sequence[Any], Sequence[Any]], test: tuple[Sequence[Any], Sequence[Any]],
    names: Sequence[str] | None = None, train_names: Sequence[str] | None = None,
) -> Result:  # fmt: skip
    """Measure logistic regression on image embeddings, fitted on one split and measured on another.

    Args:
        train, test: images and labels, numbers or names. Rows without a label (None, or -1) are skipped.
        names, train_names: of the rows, for what is said about skipped ones.

    Raises:
        EvaluationError: if there are fewer than two classes to fit, or nothing to evaluate on.
    """
    from sklearn.linear_model import LogisticRegression

    vectors, labels, sides = [], [], []
    for images, given, row_names in ((*train, train_names), (*test, names)):
        rows = Rows(name, row_names, images=images, labels=given)
        for number in rows.good:
            label = rows.columns["labels"][number]
            if is_unlabelled(label):
                rows.skipped[number] = Fault("no label", f"{label!r:.100}")
        found, _ = rows.images(encoder)
        rows.require_some()
        vectors.append(np.stack([found[number] for number in rows.good]))
        labels.append(np.asarray([rows.columns["labels"][number] for number in rows.good]))
        sides.append(rows)
    if len(np.unique(labels[0])) < 2:
        raise EvaluationError(f"The rows to fit '{name}' on have one class only; it takes two at least.")
    target = labels[1]
    guessed = LogisticRegression(max_iter=1000, C=10.0).fit(vectors[0], labels[0]).predict(vectors[1])
    per_class = float(np.mean([(guessed[target == c] == c).mean() for c in np.unique(target)]))
    metrics = {"accuracy": float((guessed == target).mean()), "mean_per_class": per_class}
    sizes = {"train": len(labels[0]), "test": len(target), "classes": len(np.unique(labels[0]))}
    return _with_skips(Result(name, "linear probe", "accuracy", metrics, sizes), *sides)


def _text_pairs(
    encoder: Encoder, name: str, first: Any, second: Any, values: Any, value: str, names: Sequence[str] | None
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Return rows of two texts and a number each, the cosine of the texts of the good ones, and their numbers."""
    rows = Rows(name, names, **{"first texts": first, "second texts": second, f"{value}s": values})
    left, right = rows.texts("first texts", "first", 1), rows.texts("second texts", "second", 1)
    numbers = rows.numbers(f"{value}s", value)
    rows.require_some()
    good = rows.good
    cosine = (encoder.texts([left[n][0] for n in good]) * encoder.texts([right[n][0] for n in good])).sum(axis=1)
    return rows, cosine, np.array([numbers[n] for n in good], dtype=np.float64)


def semantic_similarity(
    encoder: Encoder, name: str, first: Sequence[str], second: Sequence[str], scores: Sequence[float],
    names: Sequence[str] | None = None,
) -> Result:  # fmt: skip
    """Measure Spearman's correlation of cosine similarities with human scores, as MTEB's STS tasks (arXiv 2210.07316).

    Raises:
        EvaluationError: if the columns differ in length, or the scores are all equal.
    """
    from scipy.stats import pearsonr, spearmanr

    rows, cosine, human = _text_pairs(encoder, name, first, second, scores, "score", names)
    if len(human) < 2 or human.min() == human.max():
        raise EvaluationError(f"The {len(human)} scores of '{name}' are all equal; there is nothing to rank.")
    if cosine.min() == cosine.max():  # a model that tells no texts apart ranks nothing
        metrics = {"spearman": 0.0, "pearson": 0.0}
    else:
        metrics = {
            "spearman": float(spearmanr(cosine, human).statistic),
            "pearson": float(pearsonr(cosine, human).statistic),
        }
    arrays = {"cosine": cosine, "human": human}
    result = Result(name, "semantic similarity", "spearman", metrics, {"pairs": len(human)}, arrays)
    return _with_skips(result, rows)


def pair_classification(
    encoder: Encoder, name: str, first: Sequence[str], second: Sequence[str], labels: Sequence[int],
    names: Sequence[str] | None = None,
) -> Result:  # fmt: skip
    """Measure average precision of cosine similarities, and the accuracy at the best threshold, as MTEB's pair
    classification.

    Raises:
        EvaluationError: if the columns differ in length, or the labels are of one class only.
    """
    from sklearn.metrics import average_precision_score

    rows, cosine, target = _text_pairs(encoder, name, first, second, labels, "label", names)
    if set(np.unique(target)) != {0, 1}:
        raise EvaluationError(f"The labels of '{name}' must be 0 and 1, both, but they are {np.unique(target)[:5]}.")
    target = target.astype(int)
    order = np.argsort(-cosine, kind="stable")
    values, hits = cosine[order], target[order]
    # Above each threshold positives are right, below it negatives; between equal similarities there is no threshold.
    right = np.concatenate([[0], np.cumsum(hits)]) + (1 - hits).sum() - np.concatenate([[0], np.cumsum(1 - hits)])
    possible = np.concatenate([[True], values[1:] != values[:-1], [True]])
    metrics = {
        "average_precision": float(average_precision_score(target, cosine)),
        "accuracy": float(right[possible].max() / len(target)),
    }
    return _with_skips(Result(name, "pair classification", "average_precision", metrics, {"pairs": len(target)}), rows)


def text_retrieval(
    encoder: Encoder, name: str, queries: Mapping[str, str], corpus: Mapping[str, str],
    relevant: Mapping[str, Any], ks: Sequence[int] = (1, 5, 10),
) -> Result:  # fmt: skip
    """Find passages by queries: nDCG@10, recall and reciprocal rank, right passages all of one grade.

    Equal passages, and the right passages of equal queries, are right answers of each other.

    Args:
        queries, corpus: texts by their ids.
        relevant: by the query's id the ids of its right passages, or their grades by id as in BEIR's judgements, where
            those above 0 are right. A query without any is left out and counted; queries and passages without text are
            skipped.

    Raises:
        EvaluationError: if an id is unknown, or no query has a right passage.
    """
    for what, given in (("queries", queries), ("corpus", corpus), ("right passages", relevant)):
        if not isinstance(given, Mapping):
            raise EvaluationError(f"The {what} of '{name}' are a {type(given).__name__}; give a dictionary by id.")
    asked_rows = Rows(name, [f"query {one}" for one in queries], True, queries=list(queries.values()))
    corpus_rows = Rows(name, [f"passage {one}" for one in corpus], True, corpus=list(corpus.values()))
    questions, passages = asked_rows.texts("queries", "query", 1), corpus_rows.texts("corpus", "positive", 1)
    corpus_rows.require_some()
    asked_rows.require_some()
    place = {one: number for number, one in enumerate(corpus)}
    asked: list[int] = []
    pairs: list[tuple[int, int]] = []
    ordered = {number: at for at, number in enumerate(corpus_rows.good)}
    without = 0
    for number, query in enumerate(queries):
        if number in asked_rows.skipped:
            continue
        right = _right_ids(relevant.get(query))
        missing = next((one for one in right if one not in place), None)
        if missing is not None:
            raise EvaluationError(f"'{name}' names the right passage '{missing}', which is not in its corpus.")
        kept = [ordered[place[one]] for one in right if place[one] in ordered]
        if not kept:
            without += 1
            continue
        pairs += [(len(asked), at) for at in kept]
        asked.append(number)
    if not asked:
        raise EvaluationError(f"No query of '{name}' has a right passage.")
    query_texts = [questions[number][0] for number in asked]
    texts = [passages[number][0] for number in corpus_rows.good]
    answers = right_answers(query_texts, texts, pairs)
    own = Counter(query for query, _ in set(pairs))
    ranks = relevant_ranks(encoder.texts(query_texts), encoder.texts(texts), answers, max([1, *ks]))
    metrics = retrieval_metrics(ranks, [k for k in ks if k <= len(texts)] or [1], len(texts), _counts(answers))
    main = "ndcg@10" if "ndcg@10" in metrics else next(m for m in reversed(metrics) if m.startswith("ndcg"))
    sizes = {
        "queries": len(asked),
        "passages": len(texts),
        "queries without right passages": without,
        "shared rows": sum(len(right) > own[query] for query, right in enumerate(answers)),
    }
    result = Result(name, "text retrieval", main, metrics, sizes, {"ranks": ranks[:, :1]})
    return _with_skips(result, asked_rows, corpus_rows)


def _right_ids(given: Any) -> list[str]:
    """Return the ids of right passages from one id, several, or grades by id."""
    if given is None:
        return []
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping):
        return [one for one, grade in given.items() if grade > 0]
    return list(dict.fromkeys(given))
