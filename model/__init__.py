"""The network, and what turns pixels and words into masks. torch, transformers and peft; no Ray, no MLflow.

Tensors carry their shape as a suffix where more than one axis matters. The legend, used in every file here:

B batch rows (questions) · I images · L text positions, image tokens included · V vocabulary · D language width ·
G scales · K tokens per scale · J = G·K codebook tokens of one group · M targets, packed over the batch · P patches ·
C decoder width · H W pixels · T image tokens
"""
