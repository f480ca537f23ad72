"""What is measured and how: retrieval across modalities, zero-shot classification, texts among themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bifocal.evaluation.encoders import Encoder
from bifocal.evaluation.examples import worst_searches
from bifocal.evaluation.retrieval import EvaluationError, relevant_ranks, retrieval_metrics

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
        sizes: of the data, such as images and captions.
        arrays: what the report draws of: embeddings, ranks, similarities.
        examples: the worst searches, see `evaluation.examples`.
    """

    task: str
    kind: str
    main: str
    metrics: dict[str, float]
    sizes: dict[str, int]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    parameters: int = 0
    speed: dict[str, float] = field(default_factory=dict)


def image_text_retrieval(
    encoder: Encoder,
    name: str,
    images: Sequence[Any],
    captions: Sequence[Sequence[str]],
    ks: Sequence[int] = (1, 5, 10),
) -> Result:
    """Search pictures by text and texts by picture; both definitions of recall where pictures have several captions.

    Args:
        images: whatever `load_image` reads.
        captions: of each picture, at least one. COCO and Flickr30k are usually reported on Karpathy's test splits of
            5,000 and 1,000 pictures with five captions each.
        ks: those larger than a side has items are left out there.

    Raises:
        EvaluationError: a picture without captions, or nothing to evaluate on.
    """
    if not len(images):
        raise EvaluationError(f"'{name}' has no pictures.")
    empty = next((n for n, texts in enumerate(captions) if not len(texts)), None)
    if empty is not None:
        raise EvaluationError(f"Picture {empty} of '{name}' has no caption; leave it out.")
    texts = [text for group in captions for text in group]
    owner = np.repeat(np.arange(len(images)), [len(group) for group in captions])
    starts = np.cumsum([0, *map(len, captions)])
    image_vectors, text_vectors = encoder.images(images), encoder.texts(texts)
    to_image = relevant_ranks(text_vectors, image_vectors, owner[:, None].tolist())
    to_text = relevant_ranks(
        image_vectors, text_vectors, [list(range(starts[n], starts[n + 1])) for n in range(len(images))]
    )
    metrics: dict[str, float] = {}
    for direction, ranks, items in (("text_to_image", to_image, len(images)), ("image_to_text", to_text, len(texts))):
        found = retrieval_metrics(ranks, [k for k in ks if k <= items] or [1], items)
        metrics |= {f"{direction}/{metric}": value for metric, value in found.items()}
    k = 5 if min(len(images), len(texts)) >= 5 else 1
    metrics["mean_recall"] = (metrics[f"text_to_image/recall@{k}"] + metrics[f"image_to_text/recall@{k}"]) / 2
    arrays = {"images": image_vectors, "texts": text_vectors, "owner": owner, "to_image": to_image, "to_text": to_text}
    sizes = {"images": len(images), "captions": len(texts), "dimensions": image_vectors.shape[1]}
    examples = worst_searches(images, texts, owner, image_vectors, text_vectors, to_image, to_text)
    return Result(name, "image-text retrieval", "mean_recall", metrics, sizes, arrays, examples)


def zero_shot(
    encoder: Encoder, name: str, images: Sequence[Any], labels: Sequence[int], classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> Result:  # fmt: skip
    """Classify pictures by the nearest class name, each in several sentences (arXiv 2103.00020).

    Raises:
        EvaluationError: fewer than two classes, a label without a class, or nothing to evaluate on.
    """
    target = np.asarray(labels)
    if len(classes) < 2 or not len(images):
        raise EvaluationError(f"'{name}' has {len(images)} pictures of {len(classes)} classes; it takes two at least.")
    if target.min() < 0 or target.max() >= len(classes):
        raise EvaluationError(f"'{name}' has the label {target.max()}, but {len(classes)} classes, from 0.")
    sentences = [template.format(one) for one in classes for template in templates]
    vectors = encoder.texts(sentences).reshape(len(classes), len(templates), -1).mean(axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    image_vectors = encoder.images(images)
    scores = image_vectors @ vectors.T
    ranks = relevant_ranks(image_vectors, vectors, target[:, None].tolist())[:, 0]
    hit = ranks == 1
    metrics = {"accuracy": float(hit.mean())}
    if len(classes) > 5:
        metrics["accuracy@5"] = float((ranks <= 5).mean())
    metrics["mean_per_class"] = float(np.mean([hit[target == c].mean() for c in np.unique(target)]))
    sizes = {"images": len(images), "classes": len(classes), "prompts": len(templates)}
    return Result(name, "zero-shot classification", "accuracy", metrics, sizes, {"scores": scores, "labels": target})


def linear_probe(
    encoder: Encoder, name: str, train: tuple[Sequence[Any], Sequence[int]], test: tuple[Sequence[Any], Sequence[int]]
) -> Result:
    """Logistic regression on image embeddings, fitted on one split and measured on another."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000, C=10.0).fit(encoder.images(train[0]), np.asarray(train[1]))
    target = np.asarray(test[1])
    found = fitted.predict(encoder.images(test[0]))
    per_class = float(np.mean([(found[target == c] == c).mean() for c in np.unique(target)]))
    metrics = {"accuracy": float((found == target).mean()), "mean_per_class": per_class}
    sizes = {"train": len(train[0]), "test": len(test[0]), "classes": len(set(train[1]))}
    return Result(name, "linear probe", "accuracy", metrics, sizes)


def semantic_similarity(
    encoder: Encoder, name: str, first: Sequence[str], second: Sequence[str], scores: Sequence[float]
) -> Result:
    """Spearman's correlation of cosine similarities with human scores, as MTEB's STS tasks (arXiv 2210.07316).

    Raises:
        EvaluationError: scores that are all equal, or not finite.
    """
    from scipy.stats import pearsonr, spearmanr

    human = np.asarray(scores, dtype=np.float64)
    if len(human) < 2 or not np.isfinite(human).all() or human.min() == human.max():
        raise EvaluationError(
            f"The {len(human)} scores of '{name}' are all equal or not finite; there is nothing to rank."
        )
    cosine = (encoder.texts(first) * encoder.texts(second)).sum(axis=1)
    metrics = {
        "spearman": float(spearmanr(cosine, human).statistic),
        "pearson": float(pearsonr(cosine, human).statistic),
    }
    arrays = {"cosine": cosine, "human": human}
    return Result(name, "semantic similarity", "spearman", metrics, {"pairs": len(human)}, arrays)


def pair_classification(
    encoder: Encoder, name: str, first: Sequence[str], second: Sequence[str], labels: Sequence[int]
) -> Result:
    """Average precision of cosine similarities, and the accuracy at the best threshold, as MTEB's pair classification.

    Raises:
        EvaluationError: labels of one class only.
    """
    from sklearn.metrics import average_precision_score

    target = np.asarray(labels)
    if set(np.unique(target)) != {0, 1}:
        raise EvaluationError(f"The labels of '{name}' must be 0 and 1, both, but they are {np.unique(target)[:5]}.")
    cosine = (encoder.texts(first) * encoder.texts(second)).sum(axis=1)
    order = np.argsort(-cosine, kind="stable")
    values, hits = cosine[order], target[order]
    # Above each threshold positives are right, below it negatives; between equal similarities there is no threshold.
    right = np.concatenate([[0], np.cumsum(hits)]) + (1 - hits).sum() - np.concatenate([[0], np.cumsum(1 - hits)])
    possible = np.concatenate([[True], values[1:] != values[:-1], [True]])
    metrics = {
        "average_precision": float(average_precision_score(target, cosine)),
        "accuracy": float(right[possible].max() / len(target)),
    }
    return Result(name, "pair classification", "average_precision", metrics, {"pairs": len(target)})


def text_retrieval(
    encoder: Encoder, name: str, queries: Mapping[str, str], corpus: Mapping[str, str],
    relevant: Mapping[str, Sequence[str]], ks: Sequence[int] = (1, 5, 10),
) -> Result:  # fmt: skip
    """Find passages by queries: nDCG@10, recall and reciprocal rank, right passages all of one grade.

    Args:
        queries, corpus: texts by their ids.
        relevant: ids of the right passages by the query's id. A query without any is left out and counted.

    Raises:
        EvaluationError: an id that there is none of, or no query with a right passage.
    """
    asked = [query for query in queries if relevant.get(query)]
    if not asked:
        raise EvaluationError(f"No query of '{name}' has a right passage.")
    place = {document: number for number, document in enumerate(corpus)}
    missing = next((d for query in asked for d in relevant[query] if d not in place), None)
    if missing is not None:
        raise EvaluationError(f"'{name}' names the right passage '{missing}', which is not in its corpus.")
    ranks = relevant_ranks(
        encoder.texts([queries[query] for query in asked]), encoder.texts(list(corpus.values())),
        [[place[document] for document in dict.fromkeys(relevant[query])] for query in asked],
    )  # fmt: skip
    metrics = retrieval_metrics(ranks, [k for k in ks if k <= len(corpus)] or [1], len(corpus))
    main = "ndcg@10" if "ndcg@10" in metrics else next(m for m in reversed(metrics) if m.startswith("ndcg"))
    sizes = {
        "queries": len(asked),
        "passages": len(corpus),
        "queries without right passages": len(queries) - len(asked),
    }
    return Result(name, "text retrieval", main, metrics, sizes, {"ranks": ranks})
