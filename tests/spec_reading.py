"""A second, slow reading of SPEC.md: 04_denoise and 05_pairs, to compare with."""

from fractions import Fraction
from itertools import permutations


def exact(number):
    """The number as JSON spells it: 0.6 is 3/5, not the nearest binary fraction."""
    return Fraction(str(number))


def scored(response):
    """Whether there is such a response and it has a score pair."""
    return response is not None and response.get("scores") is not None


def point(response):
    """The exact (G_a, G_b) of a scored response."""
    a, b = response["scores"]
    return exact(a), exact(b)


def covariance(points, i, j, ddof):
    """Cov of coordinates i and j: the sum of (p_i - q_i)(p_j - q_j) over ordered pairs is 2n scatters."""
    n = len(points)
    total = sum((p[i] - q[i]) * (p[j] - q[j]) for p, q in permutations(points, 2))
    return total / (2 * n * (n - ddof))


def exact_det(points, ddof):
    """Determinant of the covariance matrix of equation 1; 0 for fewer than two points."""
    if len(points) < 2:
        return Fraction(0)
    (aa, ab), (ba, bb) = [[covariance(points, i, j, ddof) for j in (0, 1)] for i in (0, 1)]
    return aa * bb - ab * ba


def denoise(row, rho, consistency=True, informativeness=True, cov_scope="candidates", ddof=0, det_min=0.0):
    """(reason, det): why the prompt is dropped, None when it is kept, and the determinant as a float."""
    refined = row.get("refined")
    candidates = [point(r) for r in row["responses"] if scored(r)]
    if not scored(refined) or not candidates:
        return "unscored", None

    best = point(refined)
    in_scope = [*candidates, best] if cov_scope == "all" else candidates
    true_det = exact_det(in_scope, ddof)
    det = float(true_det)  # what is reported is what is compared; only "is it 0" is asked of the exact value

    strictly_best = all(best[axis] > other[axis] for other in candidates for axis in (0, 1))
    if consistency and not strictly_best:
        return "inconsistent", det
    if informativeness and not (true_det > 0 and det > det_min):
        return "det_zero", det
    if informativeness and not det <= rho:
        return "det_above_rho", det
    return None, det


def taking_part(row):
    """(response, is_refined) of the scored responses, candidates then refined, the first of each text."""
    everyone = [(r, False) for r in row["responses"]] + [(row.get("refined"), True)]
    able = [(r, is_refined) for r, is_refined in everyone if scored(r)]
    texts = [r["text"] for r, _ in able]
    return [able[k] for k in range(len(able)) if texts[k] not in texts[:k]]


def composite(p, weights):
    """Reward Soups' (a G_a + b G_b) / (a + b)."""
    a, b = map(exact, weights)
    return (a * p[0] + b * p[1]) / (a + b)


def preferred(p, q, rule, weights):
    """Whether scores p are preferred over scores q."""
    if rule == "lex":
        return p[0] > q[0] or (p[0] == q[0] and p[1] > q[1])
    if rule == "pareto":
        return p[0] >= q[0] and p[1] > q[1]
    return composite(p, weights) > composite(q, weights)  # "weighted"


def pairs(row, delta, rule="lex", weights=(1, 1), refined_only=False):
    """Every ordered pair whose first is preferred by the rule, with margin >= delta."""
    found = []
    for (y, y_refined), (z, z_refined) in permutations(taking_part(row), 2):
        p, q = point(y), point(z)
        margin = abs(p[0] - q[0]) + abs(p[1] - q[1])
        gap = abs(p[0] + p[1] - q[0] - q[1])
        if rule == "weighted":
            gap = composite(p, weights) - composite(q, weights)
        allowed = y_refined or z_refined or not refined_only
        if allowed and preferred(p, q, rule, weights) and margin >= exact(delta):
            pair = {"chosen_text": y["text"], "rejected_text": z["text"]}
            pair |= {"chosen_scores": y["scores"], "rejected_scores": z["scores"]}
            found.append(pair | {"margin": float(margin), "gap": float(gap)})
    return found
