"""The graph: what autograd recorded of a forward pass, read: uses, layouts of samples, backpropagation."""
