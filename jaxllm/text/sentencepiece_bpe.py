"""Merges of a SentencePiece BPE vocabulary, which stores scores only."""

from collections.abc import Mapping


def derive_merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merge list that merges as SentencePiece does: the pair whose union scores highest first.

    Args:
      vocab: token -> id.
      scores: token -> score; of two merges the one with the higher score of the union comes first.

    Returns:
      Every pair of tokens whose union is a token, best first; pairs of one union by their ids.
    """
    ranked: list[tuple[float, int, str, str]] = []
    for union, score in scores.items():
        pairs = []
        for cut in range(1, len(union)):
            left = vocab.get(union[:cut])
            if left is not None and (right := vocab.get(union[cut:])) is not None:
                pairs.append((left, right, cut))
        pairs.sort()
        ranked += [(-score, len(ranked) + i, union[:cut], union[cut:]) for i, (_, _, cut) in enumerate(pairs)]
    ranked.sort()
    return [(left, right) for _, _, left, right in ranked]
