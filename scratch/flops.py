import sys, torch, time; sys.path.insert(0,'.')
from transformers import AutoConfig, AutoModelForCausalLM
from peft import get_peft_model, LoraConfig
from peft_greentrainer.prompts.split import SplitBackbone
from peft_greentrainer.measuring.formulas import flop_counter
torch.set_num_threads(1)
m=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained('examples/smollm2-135m.json')).train()
ids=torch.randint(3,1000,(2,512)); labels=ids.clone(); labels[:,:472]=-100
b=dict(input_ids=ids,attention_mask=torch.ones_like(ids),labels=labels)
def f(g=None):
    m.zero_grad()
    if g:
        with SplitBackbone(m,g) as s:
            if True: m(**b) # verification
            with flop_counter() as c:
                t=time.time(); m(**b).loss.backward(); t=time.time()-t
            assert s.splits==2
    else:
        with flop_counter() as c:
            t=time.time(); m(**b).loss.backward(); t=time.time()-t
    return c.get_total_flops(),t
full,tf=f()
for g in ('keys','none'):
    x,t=f(g); print(g,'all tensors',round(x/full,4),round(t/tf,3))
