"""Beam search in plain Python, one input at a time, as the two libraries describe it."""

from __future__ import annotations

import math

import numpy as np

NEVER = -1e9


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


def blocked(row, n):
    """Tokens that would complete an n-gram which the row has already."""
    if n == 0 or len(row) + 1 < n:
        return set()
    prefix = tuple(row[len(row) - n + 1 :]) if n > 1 else ()
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return {g[-1] for g in grams if g[:-1] == prefix}


def continuations(logits_of, running, rules, t, beams, first):
    """The 2 * beams best (sum, beam, token), ties to the lower beam and token."""
    found = []
    for b, (total, row) in enumerate(running):
        if first and b > 0:
            continue
        scores = log_softmax(logits_of(row))
        for token in range(len(scores)):
            value = scores[token]
            if token in rules.never or (token == rules.eos and t < rules.min_new):
                value = -math.inf
            if rules.force_eos and t == rules.max_new - 1 and token != rules.eos:
                value = -math.inf
            if token in blocked(row, rules.no_repeat_ngram):
                value = -math.inf
            found.append((total + value, b, token))
    found.sort(key=lambda c: (-c[0], c[1], c[2]))
    return found[: 2 * beams]


def fairseq(logits_of, rules, beams, penalty):
    running, finished = [(0.0, [rules.start])] * beams, []
    for t in range(rules.max_new):
        found = continuations(logits_of, running, rules, t, beams, t == 0)
        for total, b, token in found[:beams]:
            if token == rules.eos and total > -math.inf and len(finished) < beams:
                finished.append((total / (t + 1) ** penalty, running[b][1] + [token]))
        if len(finished) == beams:
            break
        running = [(s, running[b][1] + [k]) for s, b, k in found if k != rules.eos][:beams]
    return sorted(finished, key=lambda f: -f[0])


def huggingface(logits_of, rules, beams, penalty, early):
    running, pool = [(0.0, [rules.start])] * beams, []
    for t in range(rules.max_new):
        found = continuations(logits_of, running, rules, t, beams, t == 0)
        last = t + 1 == rules.max_new
        for total, b, token in found[:beams]:
            if (token == rules.eos or last) and total > -math.inf:
                pool.append((total / (t + 1) ** penalty, running[b][1] + [token]))
        pool = sorted(pool, key=lambda f: -f[0])[:beams]
        if last:
            break
        running = [(s, running[b][1] + [k]) for s, b, k in found if k != rules.eos][:beams]
        if len(pool) == beams:
            longest = rules.max_new if early == "never" and penalty > 0 else t + 1
            if early is True or running[0][0] / longest**penalty <= pool[-1][0]:
                break
    return pool
