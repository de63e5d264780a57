"""Explanation mode: inside it, autograd sees a network as the linear map that it is for its input."""
