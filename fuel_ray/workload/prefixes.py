"""Which recorded prompts begin alike, from the hash of each of their blocks."""

from array import array
from collections.abc import Hashable

import numpy as np


class Hashed:
    """The hashed blocks of prompts in their order, under numbers in order of appearance."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._flat = array("i")
        self._blocks = array("i")

    def append(self, hash_ids: object) -> None:
        """Add a prompt; None is one whose blocks are unknown.

        Raises:
            ValueError: it is no list of numbers or texts.
        """
        ids = [] if hash_ids is None else hash_ids
        if not isinstance(ids, list):
            raise ValueError(f"hash_ids are {str(ids)[:40]!r}, no list")
        if not {type(block) for block in ids} <= {int, str, float}:
            raise ValueError("hash_ids has what is neither number nor text")
        numbers = self._numbers
        self._flat.extend([numbers.setdefault(block, len(numbers)) for block in ids])
        self._blocks.append(len(ids))

    @property
    def blocks(self) -> np.ndarray:
        """Hashed blocks of each prompt (n,)."""
        return np.array(self._blocks, np.int64)

    def shared(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A prefix id for each prompt at these places, and its blocks in it; -1 and 0 if none begins alike.

        Prompts form a tree of blocks, of which those in at least two prompts matter. ``Requests`` knows one
        chain per prefix id, so the tree is cut into chains that follow the most shared child, and each prompt
        belongs to the chain of its deepest shared block. Prompts of one chain share exactly what they share
        in the trace; what prompts of different chains share above the branch is lost, so sharing is
        under-estimated.
        """
        flat = np.array(self._flat, np.int64)
        begin, blocks = (np.cumsum(self.blocks) - self.blocks)[which], self.blocks[which]
        prefix_id, depth = np.full(len(blocks), -1), np.zeros(len(blocks), np.int64)
        active = np.flatnonzero(blocks > 0)  # prompts that share all their blocks so far
        parent, chain_of, chains, level = np.zeros(len(active), np.int64), np.array([-1]), 0, 0
        while len(active):
            block = flat[begin[active] + level]
            node, chain_of = _nodes(parent, block, chain_of=chain_of, chains=chains)
            chains = max(chains, int(chain_of.max()) + 1)
            stays = chain_of[node] >= 0
            active, node = active[stays], node[stays]
            prefix_id[active], depth[active] = chain_of[node], level + 1
            level += 1
            longer = blocks[active] > level
            active, parent = active[longer], node[longer]
        return prefix_id, depth


def _nodes(
    parent: np.ndarray, block: np.ndarray, *, chain_of: np.ndarray, chains: int
) -> tuple[np.ndarray, np.ndarray]:
    """A level of the tree: the node of each prompt, and the chain of each node; -1 if only one prompt has it.

    ``chain_of`` are those of the level above, of which there are ``chains`` so far.
    """
    key = parent * (block.max() + 1) + block
    _, first, node, uses = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    above = chain_of[parent[first]]
    # The most used child of a node goes on with its chain; of equals, the first in the trace.
    ranked = np.lexsort((first, -uses, parent[first]))
    leads = np.zeros(len(uses), bool)
    leads[ranked[np.diff(parent[first][ranked], prepend=-1) != 0]] = True
    shared, goes_on = uses > 1, leads & (above >= 0)
    begins = shared & ~goes_on
    chain = np.where(shared & goes_on, above, -1)
    chain[begins] = chains + np.arange(begins.sum())
    return node, chain
