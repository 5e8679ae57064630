// The native operators, a table of contents. Their schemas are in peft_ops/_library.py.

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(peft_ops_native, CPU, m) {
  m.impl("first_bad_id", TORCH_BOX(&peft_ops::first_bad_id));
  m.impl("first_bad_offset", TORCH_BOX(&peft_ops::first_bad_offset));
  m.impl("ia3_glu", TORCH_BOX(&peft_ops::ia3_glu));
  m.impl("ia3_glu_backward", TORCH_BOX(&peft_ops::ia3_glu_backward));
  m.impl("ia3_scale", TORCH_BOX(&peft_ops::ia3_scale));
  m.impl("ia3_scale_backward", TORCH_BOX(&peft_ops::ia3_scale_backward));
  m.impl("packed_layout", TORCH_BOX(&peft_ops::packed_layout));
  m.impl("prompt_concat", TORCH_BOX(&peft_ops::prompt_concat));
  m.impl("prompt_concat_backward", TORCH_BOX(&peft_ops::prompt_concat_backward));
  m.impl("prompt_concat_packed", TORCH_BOX(&peft_ops::prompt_concat_packed));
  m.impl("prompt_concat_packed_backward", TORCH_BOX(&peft_ops::prompt_concat_packed_backward));
  m.impl("prompt_layout", TORCH_BOX(&peft_ops::prompt_layout));
  m.impl("prompt_embed", TORCH_BOX(&peft_ops::prompt_embed));
  m.impl("prompt_embed_backward", TORCH_BOX(&peft_ops::prompt_embed_backward));
}
