"""Rows of multimodal data: values, masks, and how programs observe them."""
