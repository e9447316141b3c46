"""Paper-close reference loops, one per recipe: one matrix, float64, no buckets, no tiles, no in-place work.

They are written from the papers' formulas and share no code with the package, so that agreement means something. The
one thing that a test may hand in is the subspace finder, because a random finder cannot be compared otherwise:
`find(G, rank, step, old) -> basis` gets the oriented gradient (projected side first).
"""
