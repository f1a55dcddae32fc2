"""The evaluation of recommenders: the protocol, the metrics and the report."""
