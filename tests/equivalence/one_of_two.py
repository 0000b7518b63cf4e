"""Run by test_processes.py: a long chunk, a few tokens and a gradient on eight devices, of one process or of two.

Arguments: mesh, file for the results, then for two processes: process number and coordinator address.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

if len(sys.argv) > 3:
    jax.distributed.initialize(sys.argv[4], num_processes=2, process_id=int(sys.argv[3]))

from tests.models import three
from v4_jax import Transformer
from v4_jax.parameter_tree import placements
from v4_jax.placement import Place
from v4_jax.sharding.mesh import make_mesh

tiny = three()
place = Place(make_mesh(sys.argv[1]), "long-context")
model = Transformer(tiny.config, policy="float32", mesh=place.mesh, rules=place.rules)
params = jax.device_put(jax.tree.map(np.asarray, tiny.params), placements(tiny.config, place.mesh, place.rules))
tokens = np.asarray(jax.random.randint(jax.random.key(5), (2, 1027), 0, 64))


@jax.jit
def step(params, tokens, cache):
    output = model.apply({"params": params}, tokens, cache=cache, logits="last")
    return output.cache, place.keep(output.logits)


@jax.jit
def gradient(params, tokens):
    def loss(head):
        return jnp.sum(jnp.sin(model.apply({"params": params | {"embed": head}}, tokens).logits)) / 1024

    return place.keep(jax.grad(loss)(params["embed"]))


cache, results = jax.jit(lambda: place.cache(tiny.config, 2, 2048, "float32"))(), {}
for first, last in ((0, 1024), (1024, 1025), (1025, 1026), (1026, 1027)):
    cache, logits = step(params, place.put(tokens[:, first:last]), cache)
    results[f"logits {last}"] = np.asarray(logits)
results["gradient"] = np.asarray(gradient(params, place.put(tokens[:, :1024])))
if jax.process_index() == 0:
    np.savez(sys.argv[2], **results)
