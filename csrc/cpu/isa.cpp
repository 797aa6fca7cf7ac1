// Compiled once per instruction set, with -DSK_ISA=<namespace> and that set's flags.
#include "dispatch.h"
#include "gather_logits.inl"
#include "sample_logits.inl"
#include "sample_targets.inl"
#include "slim_loss.inl"
#include "softmax_gradient.inl"
#include "sparse_softmax.inl"
#include "topk_logits.inl"

#define SK_STRING_OF(x) #x
#define SK_STRING(x) SK_STRING_OF(x)

namespace slimkernels {
namespace SK_ISA {

extern const KernelTable table;
constexpr KernelTable table = {SK_STRING(SK_ISA), topk_logits,      gather_logits, sparse_softmax, slim_loss,
                               slim_loss_split,   softmax_gradient, sample_logits, sample_targets};

}  // namespace SK_ISA
}  // namespace slimkernels
