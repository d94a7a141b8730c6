"""Define the term of each divergence, one file per divergence.

Files are named as in config/declarations/divergences.py. A file has a function
`term(log_q, log_p, **parameters)`: the logarithms of the teacher's and of the student's
probabilities, [..., M] of the same float type, and the divergence's parameters, to the terms
[..., M] of the sum, differentiable in log_p. It may also have `compare_sparse`, see
`losses/sparse_comparison.py`, if sparse targets have a closed form.

Terms are computed from logarithms alone, so that nothing overflows, p -> 0 and q -> 0 give no NaN,
and equal distributions give exactly 0. An id that does not exist (q = p = 0) has a finite logarithm
on both sides.
"""
