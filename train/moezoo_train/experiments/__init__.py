"""Claims of papers, tested.

``compare`` trains methods side by side at equal active FLOPs; ``carving``, ``hardening``,
``facts``, ``forgetting`` and ``upcycling`` are experiments of their own, on what ``common`` shares.
"""
