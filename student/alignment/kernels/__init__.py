"""The compiled loops of the fast path. `student.alignment.reference` says what they compute, in the same order.

Legend: S student tokens, T teacher rows, N candidates of all rows, B bytes, V_S and V_T the vocabularies. CSR
everywhere. A candidate is known by its place n in 0…N-1. All kernels are pure functions of their arrays, compiled once
and cached by numba, whose cache knows changes of a kernel's own file only: a kernel calls none of another file.
"""
