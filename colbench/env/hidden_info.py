"""Where c, the hidden information, is shown to a model, and where it is taken away again.

Of everything that agent, critic and policy stage read, only the critic's prompt holds c. (The
simulated human knows c too; its prompt is the environment's own.)
"""
HIDDEN_INFO = "\n\nHidden from the agent, the reference is:\n"


def with_hidden_info(messages: list[dict], hidden_info: str) -> list[dict]:
    """The critic's view of a dialogue (a copy): c is at the end of the system message."""
    system, *rest = messages
    return [{"role": "system", "content": system["content"] + HIDDEN_INFO + hidden_info}, *rest]


def without_hidden_info(state: dict) -> dict:
    """A state as the policy stage may read it: without the task, which holds c, and max_turns."""
    return {name: value for name, value in state.items() if name not in ("task", "max_turns")}
