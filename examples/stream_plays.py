"""Send the plays of a Kafka topic to rayrec: python examples/stream_plays.py --help

Needs `pip install confluent-kafka`. Each message is a play as a JSON object, as in POST /v1/plays. Offsets are
committed after the server has stored the plays. After a crash some plays are sent again; they count once, because
each has an event id. For another kind of stream, give `forward` an object with the methods `consume` and `commit`.
"""

import argparse
import json
import sys
from typing import Any, Protocol

from rayrec.client import Client, PlaysAnswer

BATCH = 500  # plays per request, at most 1,000
WAIT_SECONDS = 1.0  # longest wait for a full batch


class Stream(Protocol):
    """The methods of confluent_kafka.Consumer that `forward` uses."""

    def consume(self, num_messages: int, timeout: float) -> list[Any]:
        """Return the next messages: at most `num_messages`, those that arrive within `timeout` seconds."""

    def commit(self, *, asynchronous: bool) -> Any:
        """Mark all messages so far as processed."""


def forward(stream: Stream, client: Client) -> PlaysAnswer | None:
    """Send one batch of messages, then commit it; return None if no message came."""
    messages = stream.consume(BATCH, WAIT_SECONDS)
    for message in messages:
        if message.error():
            raise SystemExit(f"the stream failed: {message.error()}")
    if not messages:
        return None
    answer = client.plays([read_play(message) for message in messages])
    for error in answer["errors"]:
        print(f"left out: {error['where']}: {error['detail']}", file=sys.stderr)
    stream.commit(asynchronous=False)
    return answer


def read_play(message: Any) -> dict[str, Any]:
    """Return the play of a message; without an event id, its position in the topic becomes the event id."""
    position = f"{message.topic()}-{message.partition()}-{message.offset()}"
    try:
        play = json.loads(message.value() or b"")  # a Kafka tombstone has no value
    except ValueError:
        play = None
    if not isinstance(play, dict):
        play = {}  # the server refuses only this play, and gives the reason
    return {"event_id": position, **play}


def main() -> None:
    parser = argparse.ArgumentParser(description="Send the plays of a Kafka topic. The key comes from RAYREC_API_KEY.")
    parser.add_argument("url", help="of rayrec, such as http://localhost:8000")
    parser.add_argument("topic")
    parser.add_argument("--brokers", default="localhost:9092")
    parser.add_argument("--group", default="rayrec", help="consumers of one group share the topic (rayrec)")
    options = parser.parse_args()
    from confluent_kafka import Consumer

    settings = {"bootstrap.servers": options.brokers, "group.id": options.group}
    stream = Consumer({**settings, "enable.auto.commit": False, "auto.offset.reset": "earliest"})
    stream.subscribe([options.topic])
    try:
        with Client(options.url) as client:
            while True:
                answer = forward(stream, client)
                if answer is not None:
                    print(f"{answer['taken']} taken, {answer['repeated']} repeated", flush=True)
    finally:
        stream.close()


if __name__ == "__main__":
    main()
