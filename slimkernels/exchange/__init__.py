"""Imports teacher files of other projects into stores, exports stores as parquet files, and translates stores.

``translate_store`` turns a store into one of another tokenizer. All that follows is about files of other projects.

Each importer streams its source into a store; its docstring defines the source. Apart from the columns, five
properties of a format decide whether it is read correctly:

=============  ==================  =====================  ==================  ==============  =========================
format         values              normalised over        temperature         row j is about  rest to train with
=============  ==================  =====================  ==================  ==============  =========================
axolotl, raw   log-probabilities   the vocabulary         of the teacher's    token j         "ghost", "zero", "renorm"
                                                          server
axolotl,       log-probabilities   the kept ids           ``kd_temperature``  token j + 1     "renorm", "renorm_both"
prepared                                                                      (j in older)
DistillKit     log-probabilities,  the vocabulary         1                   token j + 1     "ghost", "zero", "renorm"
               approximate
Megatron       log-probabilities   the vocabulary         1                   token j + 1     "ghost", "zero", "renorm"
parquet        as in the store     as in the store        as in the store     ``positions``   as in the store
=============  ==================  =====================  ==================  ==============  =========================

Log-probabilities normalised over the vocabulary become logits with lse 0, and ``rest_lse`` is the logarithm of the mass
that they leave, NaN where it is below 1e-5 and so made of rounding. For those normalised over the kept ids, lse is the
log-sum-exp of the kept ids: their mass is then 1, the mass of the tail is not known, and there is no ``rest_lse``. None
of the formats has the teacher's log-probability of a label that is not kept. Its ``target_logit`` is then -inf, so
``slim_loss`` gives the row the weight 0 ("kd" trains on it like on any other row).
"""

from slimkernels.exchange.axolotl import import_axolotl
from slimkernels.exchange.distillkit import import_distillkit
from slimkernels.exchange.megatron import import_megatron
from slimkernels.exchange.parquet import export_parquet, import_parquet
from slimkernels.exchange.translate import TranslationReport, translate_store
from slimkernels.exchange.writing import ImportReport

IMPORTERS = {
    "axolotl": import_axolotl,
    "distillkit": import_distillkit,
    "megatron": import_megatron,
    "parquet": import_parquet,
}

__all__ = [
    "IMPORTERS",
    "ImportReport",
    "TranslationReport",
    "export_parquet",
    "import_axolotl",
    "import_distillkit",
    "import_megatron",
    "import_parquet",
    "translate_store",
]
