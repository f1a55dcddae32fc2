"""Keep a replica's ports where the application was told to listen."""

from rayrec.serving.serve_config import LOOPBACK, ServeConfig, is_loopback


def hold_to_host(config: ServeConfig) -> None:
    """Where the application listens on loopback, bind a replica's port for calls between deployments there, too.

    Serve 2.60 binds it to all interfaces, has no setting for it and unpickles what comes in. To be called in
    the constructor of a deployment: the port is opened right after it. On a cluster the port must be reached
    from other nodes, and RAY_USE_TLS with certificates of one's own is what closes it.
    """
    if not is_loopback(config.host):
        return
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    if getattr(bind, "loopback", False):
        return

    def bind_loopback(server: object, address: str) -> int:
        return int(bind(server, address.replace("[::]", LOOPBACK)))

    bind_loopback.loopback = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = bind_loopback
