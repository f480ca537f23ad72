"""The evaluation protocols: image-text and text retrieval, classification of images, similarity of texts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bifocal.data.evaluation_protocols import TEMPLATES
from bifocal.data.skips import RowError, SkippedRow
from bifocal.errors import EvaluationError
from bifocal.evaluation.encoders import Encoder
from bifocal.evaluation.failures import worst_searches
from bifocal.evaluation.labels import class_names, class_numbers, is_unlabelled
from bifocal.evaluation.relevance import caption_answers, content_ids, right_answers, shared_rows
from bifocal.evaluation.retrieval import recall_at, relevant_ranks, retrieval_metrics
from bifocal.evaluation.rows import Rows, Selection, as_sequence


@dataclass
class Result:
    """What a model reaches on one data set.

    Args:
        task: name of the data set.
        kind: name of the protocol, see `data.evaluation_protocols`.
        main: name of the metric that stands for all.
        metrics: values by name.
        sizes: counts of the data, such as images and captions. `shared rows` counts the rows that share a text or an
            image with another row; such rows are right answers of each other.
        arrays: data of the plots: embeddings, ranks, similarities.
        examples: the worst searches, see `worst_searches`.
        skips: rows that could not be used: name and cause.
        seconds: time of the measurement.
        parameters: number of the model's parameters.
        speed: texts and images embedded per second.
        rows: hash of the rows, equal if two models were measured on the same ones.
        prompts: prompts of queries and documents, if the model has them and the protocol is a search.
        dtype: dtype of the model's weights, such as "float32"; empty if an earlier version measured it.
        fast_decoding: whether large JPEGs were decoded at reduced scale.
    """

    task: str
    kind: str
    main: str
    metrics: dict[str, float]
    sizes: dict[str, int]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    skips: list[SkippedRow] = field(default_factory=list)
    seconds: float = 0.0
    parameters: int = 0
    speed: dict[str, float] = field(default_factory=dict)
    rows: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    fast_decoding: bool = False

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped rows by cause."""
        return dict(Counter(skip.cause for skip in self.skips))


def image_text_retrieval(
    encoder: Encoder,
    name: str,
    images: Sequence[Any],
    captions: Sequence[Sequence[str] | str],
    ks: Sequence[int] = (1, 5, 10),
    names: Sequence[str] | None = None,
) -> Result:
    """Search images by text and texts by image; by both definitions of recall if images have several captions.

    Texts have the prompt of a query where images are searched, and that of a document where they are searched, if the
    model has them. Equal texts and equal images (by their pixels) are right answers of each other. Rows whose image or
    captions cannot be used are skipped and named in the result.

    Args:
        encoder: the model.
        name: name of the data set.
        images: images in any form that `load_image` reads, or a column of a `datasets.Dataset`.
        captions: one or several per image. COCO and Flickr30k are usually reported on Karpathy's test splits of 5,000
            and 1,000 images with five captions each.
        ks: the k of Recall@k and nDCG@k. A k above the number of items is not measured.
        names: name of each row, for messages about skipped rows; numbers if None.

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
    image_vectors, query_vectors = np.stack([vectors[number] for number in good]), encoder.texts(texts, "query")
    text_vectors = query_vectors if encoder.document is None else encoder.texts(texts, "document")
    text_ids, image_ids = content_ids(texts), content_ids([digests[number] for number in good])
    images_of, texts_of = caption_answers(owner, text_ids, image_ids)
    to_image = relevant_ranks(query_vectors, image_vectors, images_of, max([1, *ks]))
    to_text = relevant_ranks(image_vectors, text_vectors, texts_of, max([1, *ks]))
    metrics: dict[str, float] = {}
    for direction, ranks, items, right in (
        ("text_to_image", to_image, len(good), images_of), ("image_to_text", to_text, len(texts), texts_of),
    ):  # fmt: skip
        by_name = retrieval_metrics(ranks, [k for k in ks if k <= items] or [1], items, _counts(right))
        metrics |= {f"{direction}/{metric}": value for metric, value in by_name.items()}
    k = 5 if min(len(good), len(texts)) >= 5 else 1
    metrics["mean_recall"] = (recall_at(to_image, k) + recall_at(to_text, k)) / 2
    # Plots need the rank of the first right item only; a text that many images share has many.
    arrays = {
        "images": image_vectors, "texts": query_vectors, "owner": owner, "to_image": to_image[:, :1],
        "to_text": to_text[:, :1], "text_ids": text_ids, "image_ids": image_ids,
    }  # fmt: skip
    sizes = {
        "images": len(good), "captions": len(texts), "shared rows": shared_rows(owner, text_ids, image_ids),
        "dimensions": image_vectors.shape[1],
    }  # fmt: skip
    examples = worst_searches(
        Selection(images, good), texts, owner, image_vectors, query_vectors, text_vectors, to_image, to_text,
        images_of, texts_of,
    )  # fmt: skip
    result = Result(name, "image-text-retrieval", "mean_recall", metrics, sizes, arrays, examples)
    result.prompts = encoder.prompts
    return _with_skips(result, rows)


def _counts(right: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([len(numbers) for numbers in right])


def _with_skips(result: Result, *several_rows: Rows) -> Result:
    result.skips = [skip for rows in several_rows for skip in rows.skips]
    return result


def zero_shot(
    encoder: Encoder, name: str, images: Sequence[Any], labels: Sequence[int] | Sequence[str],
    classes: Sequence[str] | None = None, templates: Sequence[str] = TEMPLATES, names: Sequence[str] | None = None,
) -> Result:  # fmt: skip
    """Classify images by the nearest class name in several prompts (arXiv 2103.00020).

    Args:
        encoder: the model.
        name: name of the data set.
        images: images in any form that `load_image` reads.
        labels: numbers of classes, or their names. Rows without a label (None, or -1 as in unlabelled splits of the
            Hub) are skipped.
        classes: names by number. If None, those of a `ClassLabel` column, or the distinct labels.
        templates: sentences with `{}` where the name of a class goes.
        names: name of each row, for messages about skipped rows; numbers if None.

    Raises:
        EvaluationError: if there are fewer than two classes, a label without a class, classes without names, or
            nothing to evaluate on.
    """
    rows = Rows(name, names, images=images, labels=labels)
    classes = class_names(name, labels, classes)
    sentences = as_sequence(name, "templates", templates)
    if not len(sentences) or not all(isinstance(sentence, str) and "{}" in sentence for sentence in sentences):
        raise EvaluationError(f"Each template of '{name}' needs {{}} where the name of a class goes.")
    if len(set(classes)) < 2:
        raise EvaluationError(f"'{name}' has {rows.count} images of {len(classes)} classes; give at least two.")
    numbers = class_numbers(rows, classes)
    vectors, _ = rows.images(encoder)
    rows.require_some()
    target = np.array([numbers[number] for number in rows.good])
    prompts = [template.format(label) for label in classes for template in sentences]
    class_vectors = encoder.texts(prompts).reshape(len(classes), len(sentences), -1).mean(axis=1)
    class_vectors /= np.linalg.norm(class_vectors, axis=1, keepdims=True)
    image_vectors = np.stack([vectors[number] for number in rows.good])
    scores = image_vectors @ class_vectors.T
    # Classes with the same name cannot be distinguished, and are right answers of each other.
    relevant = right_answers(range(len(target)), classes, enumerate(target.tolist()))
    ranks = relevant_ranks(image_vectors, class_vectors, relevant, first=1)[:, 0]
    hit = ranks == 1
    metrics = {"accuracy": float(hit.mean())}
    if len(classes) > 5:
        metrics["accuracy@5"] = float((ranks <= 5).mean())
    metrics["mean_per_class"] = float(np.mean([hit[target == c].mean() for c in np.unique(target)]))
    sizes = {"images": len(target), "classes": len(classes), "prompts": len(sentences)}
    result = Result(name, "zero-shot", "accuracy", metrics, sizes, {"scores": scores, "labels": target})
    return _with_skips(result, rows)


def linear_probe(
    encoder: Encoder, name: str, train: tuple[Sequence[Any], Sequence[Any]], test: tuple[Sequence[Any], Sequence[Any]],
    names: Sequence[str] | None = None, train_names: Sequence[str] | None = None,
) -> Result:  # fmt: skip
    """Measure logistic regression on image embeddings, fitted on one split and tested on another.

    Args:
        encoder: the model.
        name: name of the data set.
        train, test: images and labels, which are numbers or names. Rows without a label (None, or -1) are skipped.
        names, train_names: name of each row, for messages about skipped rows; numbers if None.

    Raises:
        EvaluationError: if there are fewer than two classes to fit, or nothing to evaluate on.
    """
    from sklearn.linear_model import LogisticRegression

    vectors, labels, splits = [], [], []
    for images, row_labels, row_names in ((*train, train_names), (*test, names)):
        rows = Rows(name, row_names, images=images, labels=row_labels)
        for number in rows.good:
            label = rows.columns["labels"][number]
            if is_unlabelled(label):
                rows.skipped[number] = RowError("no label", f"{label!r:.100}")
        by_row, _ = rows.images(encoder)
        rows.require_some()
        vectors.append(np.stack([by_row[number] for number in rows.good]))
        labels.append(np.asarray([rows.columns["labels"][number] for number in rows.good]))
        splits.append(rows)
    if len(np.unique(labels[0])) < 2:
        raise EvaluationError(f"The rows to fit '{name}' on have one class; a linear probe needs at least two.")
    target = labels[1]
    predicted = LogisticRegression(max_iter=1000, C=10.0).fit(vectors[0], labels[0]).predict(vectors[1])
    per_class = float(np.mean([(predicted[target == c] == c).mean() for c in np.unique(target)]))
    metrics = {"accuracy": float((predicted == target).mean()), "mean_per_class": per_class}
    sizes = {"train": len(labels[0]), "test": len(target), "classes": len(np.unique(labels[0]))}
    return _with_skips(Result(name, "linear-probe", "accuracy", metrics, sizes), *splits)


def _text_pairs(
    encoder: Encoder, name: str, first: Any, second: Any, values: Any, value: str, names: Sequence[str] | None
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Return rows of two texts and a number, and for the good ones the cosine of their texts and the number."""
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

    Args:
        encoder: the model.
        name: name of the data set.
        first, second: the two texts of each pair.
        scores: human score of each pair.
        names: name of each row, for messages about skipped rows; numbers if None.

    Raises:
        EvaluationError: if the columns differ in length, or the scores are all equal.
    """
    from scipy.stats import pearsonr, spearmanr

    rows, cosine, human = _text_pairs(encoder, name, first, second, scores, "score", names)
    if len(human) < 2 or human.min() == human.max():
        raise EvaluationError(f"The {len(human)} scores of '{name}' are all equal; there is nothing to rank.")
    if cosine.min() == cosine.max():  # the correlation is undefined
        metrics = {"spearman": 0.0, "pearson": 0.0}
    else:
        metrics = {
            "spearman": float(spearmanr(cosine, human).statistic),
            "pearson": float(pearsonr(cosine, human).statistic),
        }
    arrays = {"cosine": cosine, "human": human}
    result = Result(name, "sts", "spearman", metrics, {"pairs": len(human)}, arrays)
    return _with_skips(result, rows)


def pair_classification(
    encoder: Encoder, name: str, first: Sequence[str], second: Sequence[str], labels: Sequence[int],
    names: Sequence[str] | None = None,
) -> Result:  # fmt: skip
    """Measure the average precision of cosine similarities and the accuracy at the best threshold, as MTEB does.

    Args:
        encoder: the model.
        name: name of the data set.
        first, second: the two texts of each pair.
        labels: 1 for a positive pair, 0 for a negative one.
        names: name of each row, for messages about skipped rows; numbers if None.

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
    # Positives above the threshold are right, and negatives below it. No threshold lies between equal similarities.
    right = np.concatenate([[0], np.cumsum(hits)]) + (1 - hits).sum() - np.concatenate([[0], np.cumsum(1 - hits)])
    possible = np.concatenate([[True], values[1:] != values[:-1], [True]])
    metrics = {
        "average_precision": float(average_precision_score(target, cosine)),
        "accuracy": float(right[possible].max() / len(target)),
    }
    return _with_skips(Result(name, "pair-classification", "average_precision", metrics, {"pairs": len(target)}), rows)


def text_retrieval(
    encoder: Encoder, name: str, queries: Mapping[str, str], corpus: Mapping[str, str],
    relevant: Mapping[str, Any], ks: Sequence[int] = (1, 5, 10),
) -> Result:  # fmt: skip
    """Search a corpus by queries: nDCG@k, recall and reciprocal rank. All relevant passages have the same grade.

    Queries and passages have the prompts "query" and "document" of the model, if it has them. Equal passages, and the
    relevant passages of equal queries, are right answers of each other.

    Args:
        encoder: the model.
        name: name of the data set.
        queries, corpus: texts by id.
        relevant: by query id the ids of the relevant passages, or their grades by id as in BEIR's judgements, where
            those above 0 are relevant. A query without relevant passages is not searched, but counted; queries and
            passages without text are skipped.
        ks: the k of Recall@k and nDCG@k. A k above the number of passages is not measured.

    Raises:
        EvaluationError: if an id is unknown, or no query has a relevant passage.
    """
    for what, mapping in (("queries", queries), ("corpus", corpus), ("relevant passages", relevant)):
        if not isinstance(mapping, Mapping):
            raise EvaluationError(f"The {what} of '{name}' are a {type(mapping).__name__}; give a dictionary by id.")
    query_rows = Rows(name, [f"query {query_id}" for query_id in queries], True, queries=list(queries.values()))
    corpus_rows = Rows(name, [f"passage {passage_id}" for passage_id in corpus], True, corpus=list(corpus.values()))
    query_texts, passages = query_rows.texts("queries", "query", 1), corpus_rows.texts("corpus", "positive", 1)
    corpus_rows.require_some()
    query_rows.require_some()
    row_of = {passage_id: number for number, passage_id in enumerate(corpus)}
    item_of = {row: item for item, row in enumerate(corpus_rows.good)}
    searched: list[str] = []
    pairs: list[tuple[int, int]] = []
    without = 0
    for number, query_id in enumerate(queries):
        if number in query_rows.skipped:
            continue
        relevant_ids = _relevant_ids(relevant.get(query_id))
        missing = next((passage_id for passage_id in relevant_ids if passage_id not in row_of), None)
        if missing is not None:
            raise EvaluationError(f"'{name}' names the relevant passage '{missing}', which is not in its corpus.")
        items = [item_of[row] for row in map(row_of.__getitem__, relevant_ids) if row in item_of]
        if not items:
            without += 1
            continue
        pairs += [(len(searched), item) for item in items]
        searched.append(query_texts[number][0])
    if not searched:
        raise EvaluationError(f"No query of '{name}' has a relevant passage.")
    texts = [passages[number][0] for number in corpus_rows.good]
    answers = right_answers(searched, texts, pairs)
    own = Counter(query for query, _ in set(pairs))
    query_vectors, passage_vectors = encoder.texts(searched, "query"), encoder.texts(texts, "document")
    ranks = relevant_ranks(query_vectors, passage_vectors, answers, max([1, *ks]))
    metrics = retrieval_metrics(ranks, [k for k in ks if k <= len(texts)] or [1], len(texts), _counts(answers))
    main = "ndcg@10" if "ndcg@10" in metrics else next(m for m in reversed(metrics) if m.startswith("ndcg"))
    sizes = {
        "queries": len(searched),
        "passages": len(texts),
        "queries without relevant passages": without,
        "shared rows": sum(len(right) > own[query] for query, right in enumerate(answers)),
    }
    result = Result(name, "text-retrieval", main, metrics, sizes, {"ranks": ranks[:, :1]}, prompts=encoder.prompts)
    return _with_skips(result, query_rows, corpus_rows)


def _relevant_ids(judgement: Any) -> list[str]:
    """Return the ids of relevant passages from one id, several, or grades by id."""
    if judgement is None:
        return []
    if isinstance(judgement, str):
        return [judgement]
    if isinstance(judgement, Mapping):
        return [passage_id for passage_id, grade in judgement.items() if grade > 0]
    return list(dict.fromkeys(judgement))
