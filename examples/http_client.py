"""Recommend songs over HTTP with rayrec's client: python examples/http_client.py --help"""

import argparse

from rayrec.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description="Recommend songs over HTTP. The key comes from RAYREC_API_KEY.")
    parser.add_argument("url", help="such as http://localhost:8000")
    parser.add_argument("--user", help="a stored user")
    parser.add_argument("--history", action="append", help="or a song id that was just played; repeat it for more")
    parser.add_argument("--played", help="first store that --user has played this song now")
    parser.add_argument("-k", type=int, default=10, help="how many songs (10)")
    options = parser.parse_args()
    if (options.user is None) == (options.history is None) or (options.played and not options.user):
        parser.error("give --user ID or --history ID (once for each song); --played goes with --user")
    with Client(options.url) as client:
        if options.played:
            client.play(options.user, options.played)
        for song in client.recommend(user_id=options.user, history=options.history, k=options.k)["songs"]:
            names = [song["artist"] or "", song["title"] or ""]
            print("  ".join([f"{song['score']:.3f}", song["song_id"], *names]).rstrip())


if __name__ == "__main__":
    main()
