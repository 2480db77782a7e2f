"""All that is particular to a family, as data; everything else comes from a family's own generation methods."""

POSITIONS_FROM_PADDING_ID = ("kosmos-2", "kosmos-2.5")  # tokens count on from it, padding has it as its position
ENCODED_IMAGES = {"kosmos-2": "image_embeds"}  # an output of the prompt that every later forward asks for
REQUIRED_IN_TRAINING = {"molmo2": "mm_token_type_ids"}  # in later forwards too, for which it is left out
CACHES_IMAGES = ("mllama",)  # keys of the image stand where other layers keep those of the tokens
CROSS_ATTENDING = ("blip",)  # the decoder attends to the image, whose keys are no part of the prompt's cache

# Listed as models that answer about images in text, and refused: they predict no next token.
NO_NEXT_TOKEN = {"diffusion_gemma": "denoises a block of tokens at a time"}
