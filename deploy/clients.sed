# Points clients of Hugging Face's remote VAEs, which have the addresses in their code, to a service
# with models of these names. Change the address and the names to yours, then:
#
#   sed -i -f deploy/clients.sed SD.NEXT/modules/vae/sd_vae_remote.py
#   sed -i -f deploy/clients.sed COMFYUI/custom_nodes/ComfyUI-HFRemoteVae/nodes.py
#   sed -i -f deploy/clients.sed COMFYUI/custom_nodes/ComfyUI-RemoteVAE/nodes.py

# Decoding
s#https://q1bj3bpq6kzilnsu\.[a-z0-9.-]*huggingface\.cloud/\{0,1\}#http://127.0.0.1:8000/decode?model=sd#g
s#https://x2dmsqunjd6k9prw\.[a-z0-9.-]*huggingface\.cloud/\{0,1\}#http://127.0.0.1:8000/decode?model=sdxl#g
s#https://whhx50ex1aryqvw6\.[a-z0-9.-]*huggingface\.cloud/\{0,1\}#http://127.0.0.1:8000/decode?model=flux#g

# Encoding
s#https://qc6479g0aac6qwy9\.[a-z0-9.-]*huggingface\.cloud/\{0,1\}#http://127.0.0.1:8000/encode?model=sd#g
s#https://xjqqhmyn62rog84g\.[a-z0-9.-]*huggingface\.cloud/\{0,1\}#http://127.0.0.1:8000/encode?model=sdxl#g
s#https://ptccx55jz97f9zgo\.[a-z0-9.-]*huggingface\.cloud/\{0,1\}#http://127.0.0.1:8000/encode?model=flux#g
