"""Send the plays of a Kafka topic to rayrec: python examples/stream_plays.py --help

Needs `pip install confluent-kafka`. Messages are JSON objects as POST /v1/plays takes them. Offsets are committed once
the server has stored the plays: after a crash some are sent again, and count once, since each has an event id.
Any other stream works alike: give `forward` whatever has `consume` and `commit`.
"""

import argparse
import json
import sys
from typing import Any, Protocol

from rayrec.client import Client, PlaysAnswer

BATCH = 500  # plays of a request, at most 1,000
WAIT_SECONDS = 1.0  # for a batch to fill


class Stream(Protocol):
    """What is needed of a consumer, as confluent_kafka.Consumer has it."""

    def consume(self, num_messages: int, timeout: float) -> list[Any]:
        """The next messages, as many as came within `timeout` seconds."""

    def commit(self, *, asynchronous: bool) -> Any:
        """Note that all messages so far are done with."""


def forward(stream: Stream, client: Client) -> PlaysAnswer | None:
    """Send one batch of messages, then commit it; None where none came."""
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
    """The play of a message; where it has no event id, its place in the topic is one."""
    place = f"{message.topic()}-{message.partition()}-{message.offset()}"
    try:
        play = json.loads(message.value() or b"")  # a tombstone of Kafka has no value
    except ValueError:
        play = None
    if not isinstance(play, dict):
        play = {}  # refused by the server, alone, with the reason
    return {"event_id": place, **play}


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
