"""Configuration, overrides, scheduler variables, messages and chat templates."""

import json
from pathlib import Path

from benchmarks.fuzz.loop import BadError, Reader
from treepo.cluster.schedulers import check_torchrun_agrees, slurm_allocation, torchrun_allocation
from treepo.config.evaluate import EvalConfig
from treepo.config.load import dump_config, load_as, load_config
from treepo.config.run import RunConfig
from treepo.data.messages import messages_of
from treepo.data.rows import BadRow

_EXAMPLES = Path(__file__).parents[2] / "examples"
_WORDS = (
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!python/object:os.system ",
    b"!!binary ",
    b"!!int ",
    b"? ",
    b"- ",
    b"{",
    b"| ",
    b"\n---\n",
    b"%YAML 1.1\n",
    b"%TAG ! x\n",
    b"0b1",
    b"0x",
    b"1:30:00",
    b"2020-01-01",
    b".inf",
    b".nan",
    b"~",
    b"extends: ",
    b"sampling:\n  ",
    b"width: ",
    b"data:\n",
    b"learning: ",
)


def config(folder: Path) -> Reader:
    path = folder / "config.yaml"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        schema = EvalConfig if b"benchmarks" in data else RunConfig
        found = load_as(schema, path)
        path.write_text(dump_config(found), encoding="utf-8")
        if load_as(schema, path) != found:
            raise BadError("a configuration that is written and read is another")
        return found

    seeds = [file.read_bytes() for file in sorted(_EXAMPLES.rglob("*.yaml"))]
    return Reader("config", read, [seed for seed in seeds if len(seed) < 5000], _WORDS)


def overrides(_: Path) -> Reader:
    """Lines `a.b=c`."""
    base = _EXAMPLES / "quickstart.yaml"
    keys = tuple(f"{line.split(':')[0].strip()}".encode() for line in base.read_text().splitlines())
    seeds = (b"sampling.width=8\nseed=3", b"learning={clip_high: 0.3}", b"reward.terms={}\nmodel.path=x")

    def read(data: bytes) -> object:
        return load_config(base, data.decode("utf-8", "surrogateescape").split("\n"))

    return Reader("overrides", read, seeds, (*keys, b"sampling.", b"trainer.parallel.", *_WORDS))


def schedulers(_: Path) -> Reader:
    """Lines NAME=value."""
    seeds = (
        b"SLURM_NNODES=3\nSLURM_NODEID=1\nSLURM_JOB_NODELIST=gpu[08-09],login\nSLURM_JOB_ID=7",
        b"NNODES=2\nNODE_RANK=1\nMASTER_ADDR=h\nMASTER_PORT=29500",
        b"PET_NNODES=2:2\nPET_NODE_RANK=0\nMASTER_ADDR=h\nLOCAL_WORLD_SIZE=1",
        b"WORLD_SIZE=2\nRANK=1\nLOCAL_WORLD_SIZE=1\nMASTER_ADDR=h",
    )
    words = (
        b"[0-9]",
        b"[1,3-4]",
        b"[0-99999999]",
        b"-",
        b"=",
        b"\xc2\xb2",
        b"\xd9\xa3",
        b"SLURM_STEP_NODELIST=",
    )

    def read(data: bytes) -> object:
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        environment = {name: value for name, _, value in (line.partition("=") for line in lines)}
        found = slurm_allocation(environment) or torchrun_allocation(environment)
        if found is not None:
            check_torchrun_agrees(found, environment)
            assert found.name(found.rank)
        return found

    return Reader("schedulers", read, seeds, words)


def messages(_: Path) -> Reader:
    """A prompt column's value as JSON."""
    seeds = (
        b'"What is 1 + 1?"',
        b'[{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}]',
        json.dumps(json.dumps([{"role": "user", "content": "q"}])).encode(),
    )

    def read(data: bytes) -> object:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return messages_of(value, "prompt")

    return Reader(
        "messages", read, seeds, (b'"role"', b'"content"', b'"tool_calls"', b"\"[{'role':"), (BadRow,)
    )


def chat_template(_: Path) -> Reader:
    """A template of a model folder, on a few messages."""
    from treepo.toy.byte_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer(4096)
    hugging_face = tokenizer.hugging_face
    seeds = (
        b"{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}"
        b"{% if add_generation_prompt %}<|assistant|>{% endif %}",
        b"{%- if messages[0].role == 'x' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}",
        b"{% macro f(x) %}{{ x }}{% endmacro %}{% set ns = namespace(a='') %}{% for i in range(3) %}"
        b"{% set ns.a = ns.a ~ f(i) %}{% endfor %}{{ ns.a }}{{ messages | tojson }}{{ strftime_now('%Y') }}",
    )
    words = (
        b"{% for i in range(99999) %}",
        b"{% endfor %}",
        b"{{ ",
        b" }}",
        b"*",
        b"**",
        b"9999999999",
        b"'x'",
        b" ~ ",
        b"lipsum()",
        b"|indent(99999999)",
        b"|center(9999999999)",
        b"'%9999999999d'|format(1)",
        b"self",
        b"cycler",
        b"namespace",
        b"recursive",
        b"loop(",
        b"|map",
        b".__class__",
        b"joiner",
        b"{% include 'x' %}",
        b"{% break %}",
        b"{% generation %}",
        b"tools",
        b"|batch(1)",
        b"{% call ",
    )

    def read(data: bytes) -> object:
        hugging_face.chat_template = data.decode("utf-8", "replace")
        return tokenizer.render_bounded(
            [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
        )

    return Reader("chat_template", read, seeds, words, share=0.2, growth=3 << 29)
