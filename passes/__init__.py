"""Graph passes that rewrite LoRA branches inside ``torch.compile``. They know graphs only, never modules.

======================  ============================================  =============================================
pass                    before                                        after
======================  ============================================  =============================================
``fold_scale``          ``mm(h, B^T) * s``                            ``scaled_mm(h, B^T, s)``
``stack_siblings``      ``mm(x, A_q^T), mm(x, A_k^T), mm(x, A_v^T)``  ``mm(x, cat(A_q, A_k, A_v)^T)`` and slices of it
``pair_gradients``      ``mm(dy, B) * s, mm(dy^T, h) * s``            ``gradient_pair(dy, B, h, s)``
``scatter_low_rank``    ``scatter(base + h B^T)``, ``scatter(dX)``    ``scatter(base) + scatter(h) B^T``, likewise g; dA
                                                                      from this rank's tokens
``gather_low_rank``     h of x, and g and dB of dy, both gathered     of this rank's tokens, gathered with x and dy
``widen``               ``base + scaled_mm(h, B^T, s)``               ``wide_mm([x, h], W, B, s)``: W has room for B (on
                                                                      a GPU, ranks above 64)
``accumulate``          ``base + scaled_mm(h, B^T, s)``, written      ``accumulate(base, h, B^T, s)``
``recompute_branch``    saves ``base`` and the product                saves ``base``; on a GPU, ``residual + y`` if
                                                                      that is what reads y (``save sum``)
``recompute_input``     saves ``x = silu(gate) * up`` for dA          saves what the frozen model does (on a GPU)
``recompute_dropout``   saves ``drop(x)`` and its mask                saves a seed
``beside``              ``mm(x, W^T), mm(x, A^T)``, base not kept     ``stacked_mm(x, [W, A])``: A lies behind W (on a
                                                                      GPU); of siblings as well
``sibling_gradients``   ``mm(dq, W_q) + mm(dk, W_k) + mm(g, A)``      ``joined_mm([dq, g_q, dk, g_k], [W_q, A_q, ...])``
                                                                      of a linear by itself as well (attention's out)
``unflatten_products``  ``tile(mm(reshape(x), W^T))``                 with reshapes in between, which Inductor looks
                                                                      for to pipeline products with collectives
``fuse_tiles``          products of rank R, pointwise between; those  ``tile(program, inputs)``: one kernel (on a GPU)
                        of experts as well
``orient_grouped``      ``grouped_mm(x^T, g, ends)``                  ``grouped_mm(g^T, x, ends)^T``
``pair_grouped``        grouped products ``g`` and ``dB``, scaled     ``grouped_gradient_pair(dy, B, h, ends, s)``
``fold_grouped_scale``  ``grouped_mm(h, B^T, ends) * s``              ``grouped_scaled_mm(h, B^T, ends, s)``
``accumulate_grouped``  ``base + grouped_scaled_mm(...)``, written    ``grouped_accumulate(base, ...)`` (on a CPU)
``recompute_grouped``   saves ``base`` and the product, or their sum  saves ``base``; not ``x`` for dA
======================  ============================================  =============================================

``site`` finds the LoRA branches of linears and proves what they are, ``grouped_site`` those of experts, for the passes
that have ``grouped`` in their names; ``branch`` is what both find. ``rewriter`` is the only way to change a joint
graph, ``snapshot`` the way back for those of a GPU; ``pipeline`` holds the order, the hooks in Inductor and the cache
identity; ``printer`` and ``report`` say what happened; ``kernels`` holds the operators and their lowerings;
``low_rank`` is the expression that all of this rewrites; ``shared_rows`` says how ranks share the rows of a tensor.
``tile_regions`` says what ``fuse_tiles`` cuts out of a GPU's forward and backward graphs, ``tile_nodes`` what a node
is to it, ``tile_copies`` what is computed twice for it, ``tile_siblings`` what is read once, ``tile_pairs`` and
``tile_stacks`` what is left to the matrix library at high ranks, ``tile_residuals`` what is left to a norm,
``tile_terms`` what a large product adds to by itself, ``tile_largest`` what a float8 base wants to know of a value;
``tile_writer`` writes a region's program, ``tile_sums`` adds up what programs leave in parts, ``tile_outputs`` gives
them memory that nobody else reads, ``tile_joint`` gives several of them one launch, ``row_order`` has them take rows in
the order that pipelined collectives need.
``kernels.tile_program`` says what a program means, ``kernels.tile_triton`` writes its kernel, ``kernels.tile_launch``
says with what to launch it, ``kernels.tile_rows`` where values may lie, ``kernels.tile_experts`` whose rows a tile has,
``kernels.tile_memory`` whether it fits a GPU, and ``kernels.inlined`` has Inductor launch it among its own. The entry
points are :func:`lora_fx.passes.pipeline.hooks` and :func:`lora_fx.passes.pipeline.rewrite_graph`.
"""
