import sys; sys.argv=sys.argv[:1]+['-none-']+sys.argv[1:]
exec(open('scratch/compare.py').read().split("only=sys.argv")[0])
import signal, warnings; warnings.filterwarnings('ignore')
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as N
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
logging.set_verbosity_error()
small={'vocab_size':96,'hidden_size':32,'n_embd':32,'d_model':32,'intermediate_size':64,'n_inner':64,'ffn_dim':64,'d_ff':64,'moe_intermediate_size':16,'shared_expert_intermediate_size':16,'num_hidden_layers':3,'n_layer':3,'n_layers':3,'num_layers':3,'num_attention_heads':4,'n_head':4,'n_heads':4,'num_heads':4,'num_key_value_heads':2,'head_dim':8,'max_position_embeddings':128,'n_positions':128,'num_experts':4,'num_local_experts':4,'num_experts_per_tok':2,'pad_token_id':0,'bos_token_id':1,'eos_token_id':2,'dropout':0.,'hidden_dropout':0.,'attention_dropout':0.,'resid_pdrop':0.,'embd_pdrop':0.,'attn_pdrop':0.,'hidden_dropout_prob':0.,'attention_probs_dropout_prob':0.,'ffn_hidden_size':64,'rotary_dim':8,'q_lora_rank':16,'kv_lora_rank':16,'qk_rope_head_dim':8,'qk_nope_head_dim':8,'v_head_dim':8,'n_routed_experts':4,'n_group':1,'topk_group':1,'first_k_dense_replace':1,'decoder_layers':3,'decoder_attention_heads':4,'decoder_ffn_dim':64,'encoder_layers':1,'state_size':4,'mamba_d_state':4,'sliding_window':6,'word_embed_proj_dim':32}
class T(Exception): pass
def alarm(*a): raise T()
signal.signal(signal.SIGALRM,alarm)
res={}
for kind in (sys.argv[2:] or sorted(N)):
    try:
        signal.alarm(25)
        cls=CONFIG_MAPPING[kind]
        base=cls()
        kw={k:v for k,v in small.items() if hasattr(base,k) and not (k=='sliding_window' and base.sliding_window is None)}
        try: cfg=cls(**kw)
        except Exception: 
            kw.pop('head_dim',None); cfg=cls(**kw)
        if getattr(cfg,'is_decoder',None) is False: cfg.is_decoder=True
        torch.manual_seed(0); m=AutoModelForCausalLM.from_config(cfg).train()
        n=sum(p.numel() for p in m.parameters())
        if n>2e7: print(f'{kind:22} too large {n}',flush=True); continue
        for p in m.parameters():
            if p.dim()>1: p.data.normal_(0,.3)
        line=''
        for pad in ('right','left'):
            b=batch(pad); ref=copy.deepcopy(m); mm=copy.deepcopy(m); out=reference(ref,b,'keys')
            with SplitBackbone(mm,'keys') as s:
                mine=mm(**b); mine.loss.backward()
            gs=[(p.grad,q.grad) for p,q in zip(mm.parameters(),ref.parameters())]
            top=max(q.abs().max().item() for p,q in gs if q is not None)
            dg=max(((p if p is not None else 0)-(q if q is not None else 0)).abs().max().item()/top for p,q in gs if p is not None or q is not None)
            line+=f" {pad}: splits {s.splits} loss {abs(out.loss-mine.loss).item()/out.loss.item():.0e} grads {dg:.0e} {s.why_not or ''} {getattr(s,'error','')[:150] if s.why_not else ''}"
        print(f'{kind:22}{line}',flush=True)
    except T: print(f'{kind:22} timeout',flush=True)
    except Exception as e: print(f'{kind:22} not made/run: {type(e).__name__}: {str(e)[:110]}'.replace('\n',' '),flush=True)
    finally: signal.alarm(0)
