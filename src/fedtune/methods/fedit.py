"""FedIT: the mean of A and the mean of B, weighted by examples (arXiv 2305.05644).

mean(B) mean(A) is not mean(B A): the difference is s times the weighted covariance of the factors, sum_i w_i (B_i -
mean B)(A_i - mean A), so the method is not exact.
"""

from fedtune.methods.base import ANY, Method


class FedIT(Method):
    """FedAvg of the LoRA factors."""

    name = "fedit"
    title = "FedIT (FedAvg of the factors)"
    paper = "arXiv:2305.05644"
    spaces = ANY
