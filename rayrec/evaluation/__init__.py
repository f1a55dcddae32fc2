"""The evaluation: metrics, the protocol by which recommenders are compared, and the report of it."""
