"""Numbers with a 95% interval, over sessions: what is said within one isn't independent.

A number is {"value", "low", "high", "n"}, of `n` sessions; or {"value": None, "why"} where there is
too little data.
"""

from typing import Any

import numpy as np

MIN_SESSIONS = 5  # for an interval
MIN_REPLIES = 30  # of each side, for a classifier
BOOTSTRAPS = 1000  # draws of sessions
RELEARNT = 20  # draws of sessions that the classifier is trained on anew

Number = dict[str, Any]  # {"value", "low", "high", "n"} or {"value": None, "why"}


def ratio(top, bottom, sessions) -> Number:
    """Divide sum(top) by sum(bottom), of items that belong to sessions (each (n,)).

    The same sessions give the same draws, so differences are paired.
    """
    top, bottom = (np.bincount(sessions, np.asarray(x, float)) for x in (top, bottom))
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    if len(top) < MIN_SESSIONS:
        return {"value": None, "why": f"too little: {len(top)} sessions, {MIN_SESSIONS} are needed"}
    drawn = np.random.default_rng(0).integers(0, len(top), (BOOTSTRAPS, len(top)))
    low, high = np.quantile(top[drawn].sum(1) / bottom[drawn].sum(1), [0.025, 0.975])
    return {"value": top.sum() / bottom.sum(), "low": low, "high": high, "n": len(top)}


def mean(values, sessions) -> Number:
    return ratio(values, np.ones(len(values)), sessions)


def classifier_auc(mine: list[tuple], theirs: list[tuple], seed: int) -> Number:
    """Measure how well a classifier of 3 to 5 letters tells two lists of (session, text) apart.

    It is tested on other sessions than it learns from. The interval (1.96 standard deviations) is
    of both: sessions get random weights (the Bayesian bootstrap), and it learns anew.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    for side in (mine, theirs):
        if len(side) < MIN_REPLIES or len({session for session, _ in side}) < MIN_SESSIONS:
            need = f"{MIN_REPLIES} of {MIN_SESSIONS} sessions are needed"
            return {"value": None, "why": f"too little: {len(side)} replies, {need}"}
    numbers, replies = zip(*mine, *theirs)
    _, sessions = np.unique(numbers, return_inverse=True)
    texts = np.array([f"\n{text}\n" for text in replies])
    is_mine = np.arange(len(texts)) < len(mine)
    settings = {"analyzer": "char", "ngram_range": (3, 5), "lowercase": False}
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    folds, pairs = [], []  # pairs: of my replies and theirs that a fold compares
    for learn, test in splitter.split(texts, is_mine, sessions):
        letters = TfidfVectorizer(**settings, sublinear_tf=True)
        known, unknown = letters.fit_transform(texts[learn]), letters.transform(texts[test])
        if count := is_mine[test].sum() * (~is_mine[test]).sum():
            folds.append((known, unknown, learn, test))
            pairs.append(count)

    def auc(session_weights: np.ndarray) -> float:
        weights, parts = session_weights[sessions], []
        for known, unknown, learn, test in folds:
            classifier = LogisticRegression(C=10).fit(known, is_mine[learn], weights[learn])
            scores = classifier.decision_function(unknown)
            parts.append(roc_auc_score(is_mine[test], scores, sample_weight=weights[test]))
        return np.average(parts, weights=pairs)

    count, draw = sessions.max() + 1, np.random.default_rng(seed)
    value = auc(np.ones(count))
    width = 1.96 * np.std([auc(draw.exponential(size=count)) for _ in range(RELEARNT)])
    return {"value": value, "low": max(0, value - width), "high": min(1, value + width), "n": count}
