"""Drawing from a pair: streams of noise, proposals, predictive samples."""
