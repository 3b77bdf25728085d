"""Appendix E in numbers: for which λ does u = λ G_a + G_b order responses as the paper does, G_a before G_b?

Lemma 1 asks for λ > 2 M / (smallest gap in G_a), M the largest |G_b|: 20 on integer scores from 1 to 10. There the
differences of G_b are at most 9, so that λ = 9 still has ties, and any λ above it keeps every order.

    run     python recipes/appendix_e.py        prints a table: λ, share of lexicographic orders kept, ties, reversed
"""

from itertools import pairwise, product

LAMBDAS = (0.5, 1, 2, 3, 5, 8, 9, 9.01, 10, 20)


def bound(scores: list[tuple]) -> float:
    """Lemma 1's bound on λ for a set of scores (G_a, G_b)."""
    primary = sorted({a for a, _ in scores})
    gap = min(high - low for low, high in pairwise(primary))
    return 2 * max(abs(b) for _, b in scores) / gap


def count_orders(scores: list[tuple], weight: float) -> tuple[int, int, int]:
    """How many lexicographically ordered pairs u = weight · G_a + G_b keeps, ties and reverses."""
    gaps = [weight * (y[0] - z[0]) + (y[1] - z[1]) for y, z in product(scores, scores) if y > z]
    return sum(gap > 0 for gap in gaps), gaps.count(0), sum(gap < 0 for gap in gaps)


if __name__ == "__main__":
    grid = list(product(range(1, 11), range(1, 11)))
    print(f"integer scores from 1 to 10; Lemma 1: λ > {bound(grid):g}\n")
    print("| λ | orders kept | ties | reversed |\n| --: | --: | --: | --: |")
    for weight in LAMBDAS:
        kept, ties, reverse = count_orders(grid, weight)
        print(f"| {weight:g} | {kept / (kept + ties + reverse):.2%} | {ties} | {reverse} |")
