import copy, sys, torch
sys.path.insert(0,'./tests'); sys.path.insert(0,'.')
from transformers import *
from peft_greentrainer.prompts.split import SplitBackbone
from peft_greentrainer.prompts.blocks import blocks_of as blocks
from peft_greentrainer.prompts.layout import Layout
torch.set_num_threads(1)
C=dict(vocab_size=96,hidden_size=32,intermediate_size=64,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=2,max_position_embeddings=128,pad_token_id=0)
def make():
    yield 'llama', LlamaConfig(**C)
    yield 'gemma3', Gemma3TextConfig(**C,head_dim=8,sliding_window=4)
    yield 'olmo2', Olmo2Config(**C)
    yield 'mixtral', MixtralConfig(**C,num_local_experts=4)
    yield 'gpt2', GPT2Config(vocab_size=96,n_embd=32,n_layer=3,n_head=4,n_positions=128,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0)
    yield 'opt', OPTConfig(vocab_size=96,hidden_size=32,ffn_dim=64,num_hidden_layers=3,num_attention_heads=4,max_position_embeddings=128,dropout=0.,word_embed_proj_dim=32)
    yield 'bloom', BloomConfig(vocab_size=96,hidden_size=32,n_layer=3,n_head=4,hidden_dropout=0.,attention_dropout=0.)
    yield 'neox', GPTNeoXConfig(vocab_size=96,hidden_size=32,intermediate_size=64,num_hidden_layers=3,num_attention_heads=4,max_position_embeddings=128)
    yield 'qwen3', Qwen3Config(**C,head_dim=8)
    yield 'mistral', MistralConfig(**C,sliding_window=5)
    yield 'phi', PhiConfig(**C,resid_pdrop=0.,embd_pdrop=0.)
    yield 'falcon', FalconConfig(vocab_size=96,hidden_size=32,num_hidden_layers=3,num_attention_heads=4,hidden_dropout=0.,attention_dropout=0.)
    yield 'mamba', MambaConfig(vocab_size=96,hidden_size=32,num_hidden_layers=3,state_size=4)
    yield 'qwen3next', Qwen3NextConfig(**C,head_dim=8,linear_num_value_heads=4,linear_num_key_heads=2,linear_key_head_dim=8,linear_value_head_dim=8,num_experts=4,num_experts_per_tok=2,moe_intermediate_size=16,shared_expert_intermediate_size=16,layer_types=['linear_attention','full_attention','linear_attention'])
def batch(pad):
    g=torch.Generator().manual_seed(0)
    ids=torch.randint(1,96,(4,14),generator=g); labels=torch.full_like(ids,-100); mask=torch.ones_like(ids)
    for i,(p,a) in enumerate([(9,5),(6,4),(4,8),(7,3)]):
        n=p+a
        s=0 if pad=='right' else 14-n
        mask[i]=0; mask[i,s:s+n]=1; ids[i][mask[i]==0]=0; labels[i,s+p:s+n]=ids[i,s+p:s+n]
    return dict(input_ids=ids,attention_mask=mask,labels=labels)
def reference(model,b,kind):
    """plain forward whose blocks get their prompt rows detached (keys)"""
    lay=Layout.of(b['labels'],b['attention_mask'])
    T=b['input_ids'].shape[1]
    is_prompt=lay.put_back(torch.ones(*lay.prompt_mask.shape,1),torch.zeros(*lay.answer_mask.shape,1),T).bool()
    hs=[]
    def det(block,args,kwargs):
        def f(v):
            if isinstance(v,torch.Tensor) and v.requires_grad and v.dim()>=3 and v.shape[:2]==(4,T): return torch.where(is_prompt.view(4,T,*[1]*(v.dim()-2)),v.detach(),v)
            return v
        return tuple(map(f,args)),{k:f(v) for k,v in kwargs.items()}
    for bl in blocks(model.get_decoder()): hs.append(bl.register_forward_pre_hook(det,with_kwargs=True))
    out=model(**b); out.loss.backward()
    for h in hs: h.remove()
    return out
only=sys.argv[1:]
for name,cfg in make():
    if only and name not in only: continue
    for pad in ('right','left'):
        try:
            torch.manual_seed(0); m=AutoModelForCausalLM.from_config(cfg).train()
            for p in m.parameters():
                if p.dim()>1: p.data.normal_(0,.3)
            b=batch(pad); ref=copy.deepcopy(m); out=reference(ref,b,'keys')
            with SplitBackbone(m,'keys') as s:
                mine=m(**b); mine.loss.backward()
            read=b['labels'][:,1:]!=-100
            dl=(out.logits[:,:-1][read]-mine.logits[:,:-1][read]).abs().max().item()/out.logits[:,:-1][read].abs().max().item()
            full=copy.deepcopy(m); full.zero_grad(); full(**b).loss.backward()
            top=max(q.grad.abs().max().item() for q in ref.parameters() if q.grad is not None)
            dg=max(((p.grad-q.grad).abs().max()/top).item() if p.grad is not None and q.grad is not None else (0. if (p.grad is None)==(q.grad is None) or (q.grad if q.grad is not None else p.grad).abs().max()<1e-9 else 9.) for p,q in zip(m.parameters(),ref.parameters()))
            df=max(((q.grad-f.grad).abs().max()/(f.grad.abs().max()+1e-12)).item() for q,f in zip(ref.parameters(),full.parameters()) if q.grad is not None)
            print(f"{name:10} {pad:6} splits {s.splits} loss {out.loss.item():.5f} {abs(out.loss-mine.loss).item():.1e} logits {dl:.1e} grads {dg:.1e} (full vs ref {df:.1e}) {s.why_not or ''} {getattr(s,'error','') if s.why_not else ''}",flush=True)
        except Exception as e:
            print(f"{name:10} {pad} {type(e).__name__}: {str(e)[:160]}",flush=True)
