"""The formulas of `student/alignment/README.md` in compiled loops, and the class that runs them on one response.

Legend: S student tokens, T teacher rows, N candidates of all rows (a candidate is known by its place n in 0…N-1),
V_S and V_T the vocabularies. `tests/student/alignment/reference.py` is the plain version, equal by test.

numba caches a compiled kernel until the kernel's own file changes. So a kernel calls none of another file, and a new
field of a tuple in `arrays.py` changes the kernels' types; only swapping two fields of one type would go unnoticed.
"""
