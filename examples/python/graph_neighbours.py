"""Attention over a graph, where a node sees its neighbours and itself: who sides with whom in Zachary's karate club.

    python examples/python/graph_neighbours.py

The club (W. Zachary, 1977, "An information flow model for conflict and fission in small groups") split into the party of its instructor, member
0, and that of its president, member 33. Of these two it is known where they stand; all others ask their neighbours, again and again, and
listen more to those with the same neighbours. Prints how many are placed where they went, and writes graph_neighbours.svg.
"""

import numpy as np

import attnd
import attnd.plot

EDGES = """0-1 0-2 0-3 0-4 0-5 0-6 0-7 0-8 0-10 0-11 0-12 0-13 0-17 0-19 0-21 0-31 1-2 1-3 1-7 1-13 1-17 1-19 1-21 1-30 2-3 2-7 2-8 2-9
2-13 2-27 2-28 2-32 3-7 3-12 3-13 4-6 4-10 5-6 5-10 5-16 6-16 8-30 8-32 8-33 9-33 13-33 14-32 14-33 15-32 15-33 18-32 18-33 19-33 20-32
20-33 22-32 22-33 23-25 23-27 23-29 23-32 23-33 24-25 24-27 24-31 25-31 26-29 26-33 27-33 28-31 28-33 29-32 29-33 30-32 30-33 31-32
31-33 32-33"""
WITH_THE_INSTRUCTOR = {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 16, 17, 19, 21}
MEMBERS = 34


def main():
    edges = np.array([edge.split("-") for edge in EDGES.split()], int)
    sees = np.eye(MEMBERS, dtype=bool)
    sees[edges[:, 0], edges[:, 1]] = sees[edges[:, 1], edges[:, 0]] = True
    graph = attnd.Csr(np.concatenate([[0], sees.sum(1).cumsum()]), np.nonzero(sees)[1])

    # A member is described by whom he knows; the product of two is then how many friends they share.
    rows = sees.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    sides = np.zeros((MEMBERS, 1), np.float32)
    for _ in range(30):
        sides[0], sides[33] = 1, -1
        sides = attnd.attention(rows[None], rows[None], sides[None], csr=graph, scale=2.0)[0]
    truth = np.array([member in WITH_THE_INSTRUCTOR for member in range(MEMBERS)])
    right = (sides[:, 0] > 0) == truth
    print(f"{len(edges)} friendships, {MEMBERS} members; {right.sum()} are placed where they went")
    print("not where they went:", ", ".join(map(str, np.nonzero(~right)[0])) or "nobody")

    context, weights = attnd.attention(rows[None], rows[None], rows[None], csr=graph, scale=2.0, return_weights=True)
    print(f"weights of those that a member doesn't know: {weights[0][~sees].max():.0f}; of a member, {weights[0].sum(1).mean():.3f}")
    order = np.argsort(sides[:, 0])
    names = [str(member) for member in order]
    attnd.plot.heatmap(weights[0][np.ix_(order, order)], names, title="who listens to whom, sorted by side").save("graph_neighbours.svg")
    print("wrote graph_neighbours.svg")


if __name__ == "__main__":
    main()
