"""The evaluation: metrics, the protocol by which recommenders are judged, and the report of it."""
