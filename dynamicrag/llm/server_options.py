"""Options of calls to an OpenAI-compatible server, and what a run learns about those that the server supports."""

import re

from dynamicrag.llm.completion import Request
from dynamicrag.llm.prompts import prefix_of
from dynamicrag.stage import UserError, log

TOO_LONG = re.compile(r"context.?(length|window|size)|too (long|large|many tokens)|maximum.{0,40}tokens|reduce the length", re.IGNORECASE | re.DOTALL)
NOT_TAKEN = re.compile(
    r"unsupported|not support|n't support|only support|unrecogni[sz]ed|unknown|unexpected|extra|not (permitted|allowed|available|implemented|enabled|valid|accepted)"
    r"|forbidden|strictly positive|invalid (parameter|argument|field)|only the default|deprecated|use '?max_completion_tokens|must be 1|removed|disabled",
    re.IGNORECASE,
)
# Fields for a regular expression, newest first.
CONSTRAINTS = {"structured_outputs": lambda pattern: {"regex": pattern}, "guided_regex": lambda pattern: pattern}
# Options of vLLM's server to continue an answer that the request begins.
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
LEARNT = {
    "seed": "does not support seed: another run may give other results",
    "n": "returns one sample per request: the samples of a question are requested one by one, and each is charged for "
         "the prompt",
    "temperature": "does not support temperature: its default is used, and neither selections nor answers are greedy",
    "top_p": "does not support top_p: its default is used",
    "max_tokens": "requires max_completion_tokens instead of max_tokens",
    "stop": "does not support stop: texts are cut at the stop strings afterwards, and the rest is charged",
    "structured_outputs": "does not support structured_outputs: guided_regex is tried; if selections cannot be read, "
                          "give --constrain-ids off",
    "chat_template_kwargs": "does not support chat_template_kwargs: --enable-thinking has no effect",
}


def refused_option(error, sent: dict[str, object]) -> str | None:
    """Return which of the options in `sent` the server refuses to accept; None if it refuses the request for another reason."""
    said = str(error.body if error.body is not None else error)
    if error.param in ("messages", "prompt") or TOO_LONG.search(said) or "content_filter" in str(error.code) or not (NOT_TAKEN.search(said) or "unsupported" in str(error.code)):
        return None
    if error.param in sent:
        return error.param
    named: dict[str, int] = {}
    for name in sent:
        # n is an option, but also an ordinary letter.
        form = r"(?:['\"`]n['\"`]|\bn\s*(?:=|>|must|is not)|(?:parameter|argument|field)s?(?: supplied)?:? n\b)" if name == "n" else rf"\b{name}\b"
        if match := re.search(form, said):
            named[name] = match.start()
    return min(named, key=lambda name: named[name], default=None)


class ServerOptions:
    """The options of a server's calls. Options that the server refuses are left out or replaced for the rest of the run."""

    def __init__(self, url: str, model: str, thinking: str | None):
        self._url, self._model, self._thinking = url, model, thinking
        self._said: set[str] = set()
        self._limit_name = "max_tokens"
        self._constraints = list(CONSTRAINTS)
        self._not_taken: set[str] = set()

    def takes(self, option: str) -> bool:
        """Return whether the server has not refused an option."""
        return option not in self._not_taken

    def of(self, request: Request) -> tuple[dict[str, object], dict[str, object]]:
        """Return the OpenAI options of a call and the extra options."""
        options: dict[str, object] = {self._limit_name: request.max_tokens, "temperature": request.temperature, "seed": request.seed}
        if request.top_p != 1:
            options["top_p"] = request.top_p
        if request.n > 1:
            options["n"] = request.n
        extra: dict[str, object] = {}
        if request.pattern:
            extra[self._constraints[0]] = CONSTRAINTS[self._constraints[0]](request.pattern)
        if request.stop:
            options["stop"] = list(request.stop)
        if prefix_of(request.messages):
            extra |= CONTINUE
        if self._thinking:
            extra["chat_template_kwargs"] = {"enable_thinking": self._thinking == "on"}
        return self._without_refused(options), self._without_refused(extra)

    def _without_refused(self, options: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in options.items() if name not in self._not_taken}

    def learn(self, option: str, reason: str = "") -> None:
        """Omit or replace an option from now on. Raises UserError if it cannot be omitted or replaced."""
        if option in CONTINUE:
            raise UserError(f"{self._url}: {self._model}: cannot continue a given beginning of the answer ({reason}); "
                            "remove prefix from --prompts")
        if option == "max_tokens":
            self._limit_name = "max_completion_tokens"
        elif option in CONSTRAINTS:
            if self._constraints == [option]:
                raise UserError(f"{self._url}: {self._model}: cannot restrict its output to a pattern ({reason}); "
                                "give --constrain-ids off")
            self._constraints = [form for form in self._constraints if form != option]
        else:
            self._not_taken.add(option)
        self.say(option, LEARNT[option])

    def say(self, what: str, message: str) -> None:
        """Log a warning about the server, once for each `what`."""
        if what not in self._said:
            self._said.add(what)
            log.warning("%s: %s %s", self._url, self._model, message)

    def learn_constraint(self, form: str) -> None:
        """Replace a field for constraints that has no effect; say so if it is the last one."""
        if form != self._constraints[-1]:
            self.learn(form)  # the reply was paid for and is kept
        else:
            self.say("pattern", "does not restrict selections to the identifiers of the documents shown "
                                "(--constrain-ids): rows whose selection cannot be read go to the remaining rows")
