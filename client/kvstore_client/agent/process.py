"""The process of the agent: its memory, its limits, its sockets."""

from __future__ import annotations

import os

import uvloop

from kvstore.errors import ConfigError
from kvstore.service.descriptors import DESCRIPTORS_BESIDE, raise_descriptor_limit
from kvstore.service.lifetime import end_at_once_on_signals, serve, try_addresses
from kvstore.service.log import set_up_log
from kvstore.service.memory import allocate, touch
from kvstore.service.users import SOCKET_UMASK
from kvstore.serving import REFUSALS_MAX, ServerOptions
from kvstore.units import format_size_bytes
from kvstore_client.agent.agent import Agent
from kvstore_client.agent.config import NAMES, PROGRAM, Config
from kvstore_client.agent.interface import InterfaceCounter
from kvstore_client.agent.options import check_options

# To each daemon and each other agent: for requests, for payload, for reports.
CONNECTIONS_A_NODE = 3


def run(config: Config) -> None:
    """Serve until a signal comes.

    Raises:
        ConfigError: The memory does not fit, or there is no such interface.
        TransportError: An address is taken or not ours.
        OSError: The system refuses something else.
    """
    try:
        _run(config)
    except ConfigError as error:
        # The library knows an option by the name of its field.
        option = NAMES.get(error.option, error.option)
        raise ConfigError(option, error.value, error.remedy) from error


def _run(config: Config) -> None:
    set_up_log(PROGRAM, config.log_level)
    end_at_once_on_signals(PROGRAM)
    os.umask(SOCKET_UMASK)
    options = config.agent
    endpoints = check_options(options, NAMES)
    region = allocate(options.memory_bytes, "kvagent-pool")
    agent = Agent(options, memory=region)
    others = CONNECTIONS_A_NODE * (len(endpoints.storage) + len(endpoints.relays))
    clients = ServerOptions(node_id=options.node_id).connections_max + REFUSALS_MAX
    raise_descriptor_limit(clients + others + DESCRIPTORS_BESIDE)
    try_addresses(endpoints.served)
    if options.interface:
        InterfaceCounter(options.interface).close()
    touch(region, PROGRAM, "pool")
    what = f"node {options.node_id}, pool of {format_size_bytes(options.memory_bytes)}"
    uvloop.run(serve(agent, what, options.drain_s))
