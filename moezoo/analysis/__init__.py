"""Looking into layers: which slots tokens choose, and for what. `import moezoo` does not load it.

What is not in ``__all__`` serves these functions, and may change.
"""

from moezoo.analysis.choices import SlotChoices, slot_choices
from moezoo.analysis.collision_picture import draw_collisions
from moezoo.analysis.collisions import (
    Addresses,
    CollisionCounter,
    Collisions,
    addresses_of,
    collect_collisions,
)
from moezoo.analysis.curves import draw_agreement, draw_blocks, draw_sparsity, draw_spectra
from moezoo.analysis.heat_map import draw_usage
from moezoo.analysis.isotropy import MeanCosine
from moezoo.analysis.neurons import NeuronBlock, Neurons, neurons_of
from moezoo.analysis.paths import Paths
from moezoo.analysis.sparsity import Sparsity, SparsityCounter
from moezoo.analysis.specialization import (
    Specialization,
    count_pairs,
    entropy,
    information_terms,
    occurrence_entropy,
)
from moezoo.analysis.specialization import specialization as specialization_of
from moezoo.analysis.spectrum import Covariance, Spectrum, spectrum_of, squared_singular_values
from moezoo.analysis.token_map import draw_paths, draw_tokens
from moezoo.analysis.triggers import Agreement, Sayings, TriggerKeeper, agreement, sayings
from moezoo.analysis.usage import (
    Evenness,
    SlotUsage,
    add_loads,
    collect_loads,
    layers_by_pool,
    routed_layers,
    usage_of,
)
from moezoo.analysis.watching import Context, token_mask, watch

__all__ = [
    "Addresses",
    "Agreement",
    "CollisionCounter",
    "Collisions",
    "Context",
    "Covariance",
    "Evenness",
    "MeanCosine",
    "NeuronBlock",
    "Neurons",
    "Paths",
    "Sayings",
    "SlotChoices",
    "SlotUsage",
    "Sparsity",
    "SparsityCounter",
    "Specialization",
    "Spectrum",
    "TriggerKeeper",
    "add_loads",
    "addresses_of",
    "agreement",
    "collect_collisions",
    "collect_loads",
    "count_pairs",
    "draw_agreement",
    "draw_blocks",
    "draw_collisions",
    "draw_paths",
    "draw_sparsity",
    "draw_spectra",
    "draw_tokens",
    "draw_usage",
    "entropy",
    "information_terms",
    "layers_by_pool",
    "neurons_of",
    "occurrence_entropy",
    "routed_layers",
    "sayings",
    "slot_choices",
    "specialization_of",
    "spectrum_of",
    "squared_singular_values",
    "token_mask",
    "usage_of",
    "watch",
]
